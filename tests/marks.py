"""Which parameters of a test `make test` leaves out for their time."""

import pytest


def long(*values) -> list:
    """Parameters for `make test-long`: what they show, others of the test or another test show in a shorter form."""
    return [pytest.param(value, marks=pytest.mark.long) for value in values]


def long_but(values, *kept) -> list:
    """These parameters, all but the `kept` ones for `make test-long`."""
    return [value if value in kept else long(value)[0] for value in values]
