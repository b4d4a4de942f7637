"""Clients that do harm: the service answers the others, and keeps no rows, memory or descriptors."""

import http.client
import json
import random
import resource
import select
import socket
import struct
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import pytest
from conftest import PATIENCE, until
from malformed import BORDER, EDITS, FORM, GENERATIONS, IMAGE, MIB, NOT_OF_HTTP, OF_HTTP, generation, message

# A picture's field of a form, up to its file.
PICTURE = f'--{BORDER}\r\nContent-Disposition: form-data; name="image"; filename="photo.png"\r\n\r\n'.encode()


@contextmanager
def connection(service):
    with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as client:
        yield client


def answer_of(client, method="POST"):
    """The response on a connection and its body; None if the connection is closed."""
    response = http.client.HTTPResponse(client, method=method)
    try:
        response.begin()
        return response, response.read()
    except (ConnectionError, http.client.BadStatusLine, http.client.IncompleteRead):
        return None


def reset(client):
    """Closes a connection as a process that is killed does: with RST, and without what was not sent."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.fixture
def many_descriptors():
    """The tests may open as many connections as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_idle_connections_leave_room_for_others(service, many_descriptors):
    """1000 connections are open, and 10 of them are used."""
    before = service.descriptors()
    with ExitStack() as stack:
        clients = [stack.enter_context(connection(service)) for _ in range(1000)]
        until(lambda: service.descriptors() > 1000, "1000 connections")
        for client in clients[::100]:
            client.sendall(generation(IMAGE))
        answers = [answer_of(client) for client in clients[::100]]
        assert [response.status for response, _ in answers] == [200] * 10
    until(lambda: service.descriptors() <= before, "end of the connections")


def send_until_answered(client, head, piece, count):
    """Sends a piece again and again, until the service answers or closes. Returns the number of pieces."""
    client.sendall(head)
    for sent in range(count):
        if select.select([client], [], [], 0)[0]:
            return sent
        try:
            client.sendall(piece)
        except ConnectionError:
            return sent
    return count


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize(
    "path, kind, head",
    [
        (GENERATIONS, "application/json", b'{"prompt": "'),
        (f"{GENERATIONS}/img_0/classes", "application/json", b'{"prompt": "'),
        (EDITS, FORM, PICTURE),
    ],
    ids=["generations", "classes", "edits"],
)
def test_a_body_of_a_gigabyte_is_refused(service, path, kind, head, chunked):
    before = service.memory("VmHWM")
    piece = b"x" * MIB
    headers = {"Content_Type": kind, "Content_Length": 1024 * MIB}
    if chunked:
        headers.update(Content_Length=None, Transfer_Encoding="chunked")
        head, piece = (b"%x\r\n%s\r\n" % (len(part), part) for part in (head, piece))
    with connection(service) as client:
        sent = send_until_answered(client, message("POST", path, **headers) + head, piece, 1024)
        response, body = answer_of(client)
    assert (response.status, json.loads(body)["error"]["code"]) == (413, "body_too_large")
    assert sent < 100
    assert service.memory("VmHWM") < before + 100 * MIB


def read_nothing(service, count):
    """Clients ask for long images, and read nothing of them. Others are served."""
    descriptors, tokens = service.descriptors(), service.metric("eqim_tokens_total")
    body = generation({**IMAGE, "size": service.size(1000), "stream": True})
    with ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", service.port))
            client.sendall(body)
        for more in (10 * count, 20 * count):
            wanted = tokens + more
            until(lambda: service.metric("eqim_tokens_total") >= wanted, f"{more} tokens")
            assert service.generate(**IMAGE, size=service.size(2))
        until(lambda: service.metric("eqim_pending_images") == count, "only the streams are pending")
    service.wait_until_idle()
    until(lambda: service.descriptors() <= descriptors, "end of the connections")


def test_slow_readers_do_not_hold_up_others(start):
    service = start("--max-batch", "16")
    service.generate(**IMAGE)
    read_nothing(service, 8)
    memory = service.memory()
    read_nothing(service, 8)
    # 2 to 3 % were measured: the allocator keeps them.
    assert service.memory() < 1.05 * memory


def test_clients_that_are_killed_free_their_rows(service):
    whole = service.generate(**IMAGE)
    before, cancelled = service.descriptors(), service.cancelled()
    body = generation({**IMAGE, "size": service.size(1000), "num_inference_steps": 50, "stream": True})

    def killed(seconds):
        with connection(service) as client:
            client.sendall(body)
            client.settimeout(0.1)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                with suppress(TimeoutError):
                    client.recv(MIB)
            reset(client)

    times = random.Random(0)
    with ThreadPoolExecutor(50) as pool:
        list(pool.map(killed, [times.uniform(0, 2) for _ in range(50)]))
    service.wait_until_idle()
    until(lambda: service.descriptors() <= before, "end of the connections")
    assert service.cancelled() > cancelled
    assert service.generate(**IMAGE) == whole


def check_answer(kind, request, answer):
    """Checks an answer to a malformed request, and returns its status or "closed"."""
    shown = f"{kind.__name__}: {request[:300]}"
    if answer is None:
        assert kind in NOT_OF_HTTP, f"{shown}: no answer"
        return "closed"
    response, body = answer
    assert 400 <= response.status < 500, f"{shown}: {response.status} {body}"
    if request.startswith(b"HEAD") or (kind in NOT_OF_HTTP and not body):
        return response.status
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        pytest.fail(f"{shown}: {response.status} {body}")
    assert error.keys() == {"message", "type", "param", "code"} and error["message"], shown
    return response.status


def send_malformed(service, seed, count):
    """Sends malformed requests, on one connection as long as it is open. Counts the answers by kind and status."""
    numbers, found, client = random.Random(seed), Counter(), None
    for _ in range(count):
        kind = numbers.choice(OF_HTTP + NOT_OF_HTTP)
        request = kind(numbers)
        if client is None:
            client = socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE)
        try:
            client.sendall(request)
            if kind in NOT_OF_HTTP:
                client.shutdown(socket.SHUT_WR)
        except OSError:
            # The service has closed the connection.
            assert kind in NOT_OF_HTTP, kind
        answer = answer_of(client, "HEAD" if request.startswith(b"HEAD") else "POST")
        found[kind.__name__, check_answer(kind, request, answer)] += 1
        if kind in NOT_OF_HTTP or answer is None or answer[0].will_close:
            client.close()
            client = None
    if client is not None:
        client.close()
    return found


def test_malformed_requests_are_refused(service):
    whole = service.generate(**IMAGE)
    before = service.descriptors()
    send_malformed(service, 100, 500)
    memory = service.memory()
    with ThreadPoolExecutor(4) as pool:
        found = sum(pool.map(lambda seed: send_malformed(service, seed, 2500), range(4)), Counter())
    assert found.total() == 10_000
    # Each kind is answered, not only closed.
    assert {kind for kind, status in found if status != "closed"} == {kind.__name__ for kind in OF_HTTP + NOT_OF_HTTP}
    service.wait_until_idle()
    until(lambda: service.descriptors() <= before, "end of the connections")
    assert service.process.poll() is None
    # 1 % was measured. The next image takes more.
    assert service.memory() < 1.05 * memory
    assert service.generate(**IMAGE) == whole
