"""The top floor: Prefect flows and the command line; the only code that knows Prefect."""
