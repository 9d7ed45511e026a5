"""The foundation every room stands on: configs, artifacts, ledgers, locks, errors and progress."""
