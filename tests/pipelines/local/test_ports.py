import socket

from pipelines.local.server import choose_ports


def test_ports_differ_and_earlier_free_ones_come_back_in_order():
    ports = choose_ports(6)
    assert len(set(ports)) == 6
    assert choose_ports(6, earlier=ports) == ports


def test_new_ports_lie_side_by_side_with_none_twice_at_the_end_of_the_range(monkeypatch):
    monkeypatch.setattr("random.randrange", lambda end: end - 2)
    # Which of them others have is theirs to say: the next free ones, in order, from 32766 through the end to the first.
    steps = [(port - 32_766) % (32_768 - 20_000) for port in choose_ports(4)]
    assert steps == sorted(set(steps))


def test_a_port_that_somebody_listens_on_is_replaced_and_the_others_stay():
    ports = choose_ports(3)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports[1]))
        taken.listen()
        chosen = choose_ports(3, earlier=ports)
    assert [chosen[0], chosen[2]] == [ports[0], ports[2]]
    assert chosen[1] != ports[1]


def test_numbers_that_are_no_ports_are_replaced():
    assert all(1024 <= port <= 65535 for port in choose_ports(3, earlier=[70000, -1, 0]))


def test_new_ports_are_none_that_a_connection_may_begin_at():
    # Linux' default for the near end of connections begins at 32768 (its ip-sysctl, ip_local_port_range).
    assert max(choose_ports(50)) < 32768
