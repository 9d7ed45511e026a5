import pytest

from mi_pipe.core.store import Store
from tests.report.samples import sample_artifacts


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory):
    """One artifact of every stage but `harvest`, full of hostile text."""
    return sample_artifacts(Store(tmp_path_factory.mktemp("samples")))
