"""The checks of the model."""

import pickle

from evidence.clocks.checks import CHECKS


def test_checks_come_back_from_a_worker_process():
    assert [check.what for check in pickle.loads(pickle.dumps(CHECKS))] == [check.what for check in CHECKS]


def test_every_check_names_where_its_figure_was_published():
    assert all(check.source and check.published > 0 for check in CHECKS)
