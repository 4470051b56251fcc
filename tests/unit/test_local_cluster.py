"""The servers of the local cluster do not get into each other's way."""

from local_cluster import free_ports


def test_ports_that_are_free_are_all_different():
    assert len(set(free_ports(500))) == 500
