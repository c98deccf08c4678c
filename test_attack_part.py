"""The listener under attack and faults, in small: real sockets on port 0, deadlines made short by subclasses of the handler."""
import contextlib
import errno
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

import owahttps
from owahttps import HostError, RedirectHandler, RedirectRule, RedirectServer, server_name

FILE = owahttps.__file__
KEEP = b"GET /%d HTTP/1.1\r\nHost: mail.example.com\r\n\r\n"
ONCE = b"GET /once HTTP/1.1\r\nHost: mail.example.com\r\nConnection: close\r\n\r\n"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux: sh, ulimit, signals, /dev/full")


class Lines(list):
    """A log that a test can read."""
    write = list.append


class Quick(RedirectHandler):
    head_seconds, idle_seconds, drain_seconds = 0.3, 0.3, 0.2


def wait_until(true, seconds=10.0):
    """Poll until true() is, at most so many seconds; what it gave last."""
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        select.select([], [], [], 0.005)
    return true()


@contextlib.contextmanager
def serving(handler=RedirectHandler, keep_path=True, **options):
    server = RedirectServer(("127.0.0.1", 0), handler, rule=RedirectRule(keep_path=keep_path), access_log=Lines(),
                            error_log=Lines(), **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join(5)
        server.server_close()
    assert not thread.is_alive()


def connect(server, data=b""):
    sock = socket.create_connection(server.server_address[:2], 10)
    sock.sendall(data)
    return sock


def read_all(sock):
    """What comes until the other side closes; a reset, or silence for 10 seconds, is written into it."""
    data = b""
    try:
        while True:
            chunk = sock.recv(65536)
            if not chunk:
                return data
            data += chunk
    except OSError as error:
        return data + ("(%s)" % type(error).__name__).encode()


def ask(server, data=ONCE):
    with contextlib.closing(connect(server, data)) as sock:
        return read_all(sock)


def is_whole(answer, status=b"302"):
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"\r\nContent-Length: ([0-9]+)", head)
    return head.startswith(b"HTTP/1.1 " + status) and length is not None and int(length.group(1)) == len(body)


def statuses(answers):
    return re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", answers)


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii" if os.name != "nt" else "hh", 1, 0))
    sock.close()


# ---- Clients -------------------------------------------------------------------------------------------------------

def test_slow_clients_are_cut_at_their_deadline_and_nobody_waits_for_them():
    """A byte now and then must never prolong the deadline for a head, nor hold up a normal client, nor leave anything behind."""
    class Slow(RedirectHandler):
        head_seconds = 0.6
    with serving(Slow, max_connections=200) as server:
        born, ends = time.monotonic(), {}
        slow = {connect(server): bytearray(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 9999 if number % 3 else b"")
                for number in range(150)}
        normal = []
        while slow and time.monotonic() < born + 10:
            for sock in select.select(list(slow), [], [], 0.02)[0]:
                assert read_all(sock)[:5] != b"HTTP/"
                ends[sock] = time.monotonic() - born
                del slow[sock]
                sock.close()
            for sock, head in slow.items():
                with contextlib.suppress(OSError):
                    sock.send(head[:1])
                    del head[:1]
            start = time.monotonic()
            assert is_whole(ask(server))
            normal.append(time.monotonic() - start)
        assert len(ends) == 150 and 0.5 < min(ends.values()) and max(ends.values()) < 3
        assert sorted(normal)[len(normal) // 2] < 0.1
        assert wait_until(lambda: not server._connections)
        assert sum("no whole request head in 0.6 seconds" in line for line in server.error_log) == 100


def test_slow_clients_are_dropped_a_few_at_a_time():
    """A crowd that is overdue at once must never be dropped in one go, while everybody else waits."""
    class Slow(RedirectHandler):
        head_seconds = 0.3
    with serving(Slow, max_connections=300) as server:
        turns, turn = [], server._turn
        server._turn = lambda timeout: (turns.append(len(server._connections)), turn(timeout))
        crowd = [connect(server) for _ in range(250)]
        assert wait_until(lambda: turns and max(turns) >= 200 and not server._connections)
        assert max(before - after for before, after in zip(turns, turns[1:])) <= 64
        for sock in crowd:
            sock.close()


def test_oldest_idle_connection_makes_room():
    """At the cap a new client must never be the one that waits, and no more than one old one may pay for it."""
    with serving(max_connections=20) as server:
        idle = []
        for number in range(20):
            idle.append(connect(server))
            assert wait_until(lambda: len(server._connections) == number + 1)
        with contextlib.closing(connect(server)) as kept:
            assert wait_until(lambda: select.select(idle[:1], [], [], 0)[0])
            kept.sendall(KEEP % 1)
            assert kept.recv(9999).startswith(b"HTTP/1.1 302")
            assert read_all(idle[0]) == b"" and not select.select(idle[1:], [], [], 0)[0]
            assert is_whole(ask(server)) and len(server._connections) <= 20
        for sock in idle:
            sock.close()


@pytest.mark.parametrize("idle", (0, 3))
def test_out_of_file_descriptors(idle):
    """A server that can accept nothing must never spin nor die; the connection that has waited longest makes room."""
    with serving() as server:
        waiting = [connect(server) for _ in range(idle)]
        assert wait_until(lambda: len(server._connections) == idle)
        calls, real = [], server.get_request

        def get_request():
            calls.append(time.monotonic())
            if len(server._connections) == idle and (idle or len(calls) == 1):
                raise OSError(errno.EMFILE, "Too many open files")
            return real()
        server.get_request = get_request
        assert is_whole(ask(server))
        assert len(calls) < 10 and len(server._connections) <= max(0, idle - 1)
        for sock in waiting:
            sock.close()


@pytest.mark.parametrize("count", (1, 31, 32, 33, 64, 100))
def test_pipelined_requests_are_answered_in_order(count):
    """No pipelined request may be lost, doubled or overtaken, wherever the server takes its breath."""
    with serving() as server:
        answers = ask(server, b"".join(KEEP % number for number in range(count)) + ONCE)
        assert re.findall(rb"\r\nLocation: https://mail.example.com/(.*)\r\n", answers) == [
            b"%d" % number for number in range(count)] + [b"once"]
        assert len(server.access_log) == count + 1


@pytest.mark.parametrize("start, status", [
    (b"", b"414"), (b"GET /", b"414"), (b"\r\n", b"431"), (b"GET / HTTP/1.1\r\nHost: ", b"431"), (b"GET / HTTP/1.1\r\nX: ", b"431")])
def test_a_million_bytes_without_a_line_end(start, status):
    """The server must never keep more than a head's worth of them, and the client must see why, not a reset."""
    kept = []

    class Watched(RedirectHandler):
        def handle_one_request(self):
            super().handle_one_request()
            kept.append(len(self.buffer))
    with serving(Watched) as server:
        with contextlib.closing(connect(server)) as sock:
            sender = threading.Thread(target=lambda: (sock.sendall(start + b"a" * 1000000), sock.shutdown(socket.SHUT_WR)))
            sender.start()
            answer = read_all(sock)
            sender.join(10)
        assert is_whole(answer, status) and max(kept) <= owahttps.MAX_HEAD + 8192


def test_a_body_that_never_comes():
    """The answer must never wait for a body, nor the connection outlive the drain's deadline."""
    with serving(Quick) as server:
        with contextlib.closing(connect(server, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n")) as sock:
            assert is_whole(read_all(sock))
            assert wait_until(lambda: not server._connections, 3)


@pytest.mark.parametrize("framing", ("length", "chunked"))
@pytest.mark.parametrize("size", (1, 8192, 1 << 20))
def test_a_body_never_turns_the_answer_into_a_reset(size, framing):
    """A client that sends its whole body before it reads must get the whole answer, and the body is never a request."""
    body = (KEEP % 666 * (size // 40 + 1))[:size]
    head = b"POST / HTTP/1.1\r\nHost: a\r\n"
    with serving() as server:
        for _ in range(3):
            assert is_whole(ask(server, head + (b"Content-Length: %d\r\n\r\n%s" % (size, body) if framing == "length" else
                                                b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (size, body))))
        assert len(server.access_log) == 3


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
@pytest.mark.parametrize("options", ([], ["-H", "Expect:"], ["-H", "Transfer-Encoding: chunked"], ["-0"]))
def test_curl_posts_a_megabyte(options, tmp_path):
    """curl must never report a reset, nor be told to go on with the body."""
    (tmp_path / "body").write_bytes(b"x" * (1 << 20))
    with serving() as server:
        done = subprocess.run(["curl", "-sS", "-i", "--noproxy", "*", "--data-binary", "@%s" % (tmp_path / "body"),
                               "http://127.0.0.1:%d/a" % server.server_port] + options,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=20)
        assert (done.returncode, statuses(done.stdout)) == (0, [b"302"]), done.stderr


def test_a_client_that_never_reads():
    """It must be dropped by its deadline, its answers must never pile up, and no other client may wait for it."""
    piles = []

    class Watched(Quick):
        def handle_one_request(self):
            super().handle_one_request()
            piles.append(len(self.outgoing))
    with serving(Watched) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with contextlib.closing(socket.socket()) as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(server.server_address[:2])
            deaf.setblocking(False)
            requests, deadline = b"A / HTTP/1.1\r\nHost:a\r\n\r\n" * 4000, time.monotonic() + 10
            while time.monotonic() < deadline and not (piles and piles[-1]):
                with contextlib.suppress(BlockingIOError):
                    requests = requests[deaf.send(requests):]
            start = time.monotonic()
            assert is_whole(ask(server)) and time.monotonic() - start < 0.3
            assert wait_until(lambda: not server._connections, 5)
        assert max(piles) < 32 * 1024


def test_half_close_is_answered():
    """A client that has said all it has to say must never be taken for gone."""
    with serving() as server:
        with contextlib.closing(connect(server, KEEP % 1)) as sock:
            sock.shutdown(socket.SHUT_WR)
            assert is_whole(read_all(sock))


@pytest.mark.parametrize("end", (socket.socket.close, reset))
def test_clients_that_go_away_leave_nothing_behind(end):
    """A client that closes or resets at any stage must never leave a connection, kill the server or reach the log as a fault."""
    stages = (b"", b"G", b"GET / HTTP/1.1\r\nHost: a\r\n", KEEP % 1, KEEP % 1 * 50, b"\x16\x03\x01",
              b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999\r\n\r\nx", b"a" * 9000)
    with serving() as server:
        for number in range(400):
            end(connect(server, stages[number % len(stages)]))
        assert is_whole(ask(server)) and wait_until(lambda: not server._connections)
        assert not [line for line in server.error_log if "refused: " not in line]


@pytest.mark.parametrize("first, answer, reason", [
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"", "TLS on the plain HTTP port"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"505", "not HTTP/1"),
    (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", b"400", "malformed request line"),
    (b"\x80\x2e\x01\x00\x02", b"", ""), (b"EHLO a\r\n", b"400", "malformed request line"),
    (b"\x03\x00\x00\x13\x0e\xe0\r\n\r\n", b"400", "control byte")])
def test_other_protocols(first, answer, reason):
    """What is not HTTP must never hang beyond a head's deadline, and is told in one line why."""
    with serving(Quick) as server:
        assert statuses(ask(server, first))[:1] == ([answer] if answer else [])
        assert len(server.error_log) == 1 and server.error_log[0].endswith("refused: %s\n" % (
            reason or "no whole request head in 0.3 seconds"))


@pytest.mark.parametrize("head", (ONCE, b"\r\n" + ONCE, ONCE[:-2] + b"X : y\r\n\r\n", ONCE[:-2] + b"a: \r\n\tb\r\n\r\n"))
def test_one_byte_a_packet(head):
    """Where the packets end must never change the answer."""
    with serving() as server:
        with contextlib.closing(connect(server)) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for number in range(len(head)):
                sock.send(head[number:number + 1])
            answer = read_all(sock)
        undated = [re.sub(rb"Date: [^\r]*", b"", text) for text in (answer, ask(server, head))]
        assert undated[0] == undated[1] and is_whole(answer, answer[9:12])


# ---- Heads ---------------------------------------------------------------------------------------------------------

START = b"GET / HTTP/1.1\r\nHost: mail.example.com\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: evil.example\r\n\r\n"


@pytest.mark.parametrize("fields, expected", [
    (b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG", [b"400"]),
    (b"Content-Length: 47\r\n\r\n", [b"302"]), (b"Content-Length: 00\r\n\r\n", [b"302", b"302"]),
    (b"Content-Length: 0\r\nContent-Length: 47\r\n\r\n", [b"400"]), (b"Content-Length: 0, 0\r\n\r\n", [b"400"]),
    (b"Content-Length: +0\r\n\r\n", [b"400"]), (b"Content-Length: -1\r\n\r\n", [b"400"]), (b"Content-Length:\r\n\r\n", [b"400"]),
    (b"Content-Length: 0_0\r\n\r\n", [b"400"]), (b"Content-Length: \xb2\r\n\r\n", [b"400"]), (b"Content-Length: \xa00\r\n\r\n", [b"400"]),
    (b"Content-Length : 47\r\n\r\n", [b"400"]), (b"Content-Length: 0\x0b\r\n\r\n", [b"400"]),
    (b"Transfer-Encoding: chunked\r\n\r\n0\r\nHost: evil.example\r\n\r\n", [b"302"]), (b"Transfer-Encoding: identity\r\n\r\n", [b"302"]),
    (b"Transfer-Encoding: xchunked\r\n\r\n", [b"302"]), (b"Transfer-Encoding:\r\n chunked\r\n\r\n", [b"400"]),
    (b"Transfer-Encoding : chunked\r\n\r\n", [b"400"]), (b"X: x\nTransfer-Encoding: chunked\r\n\r\n", [b"400"]),
    (b"X: x\rTransfer-Encoding: chunked\r\n\r\n", [b"400"]), (b"\n", [b"400"]), (b"\r\r\n\r\n", [b"400"]),
    (b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n", [b"302", b"302"]), (b"Connection: keep-alive, close\r\n\r\n", [b"302"])])
def test_one_request_is_never_two(fields, expected):
    """Where others may see a body, what follows the head must never be answered as a request."""
    with serving() as server:
        assert statuses(ask(server, START + fields + SMUGGLED[:-2] + b"Connection: close\r\n\r\n")) == expected


@pytest.mark.parametrize("name", ("[::ffff:01.2.3.4]", "[::1.2.3.04]", "[::ffff:1.2.3.256]", "01.2.3.4", "1.2.3", "0x7f.1", "a.0x"))
def test_address_that_browsers_refuse(name):
    """Python before 3.9.5 takes "01" for an octet; a browser would never follow a Location with it."""
    with pytest.raises(HostError):
        server_name(name)


def fill(unit, end=b"\r\n", start=START):
    return start + unit * ((owahttps.MAX_HEAD - len(start) - len(end)) // len(unit)) + end


@pytest.mark.parametrize("head", [
    fill(b"a:\r\n"), fill(b"a:\r\n", b"!\r\n\r\n"), fill(b"Host:\r\n"), fill(b"Host:\r\n", b"\x01\r\n\r\n"), fill(b"Referer:\xff\r\n"),
    START + b"Referer: " + b"\xff" * 32000 + b"\r\n\r\n", START + b"User-Agent: " + b" \t" * 16000 + b"\x00\r\n\r\n",
    START + b"a" * 32000 + b"\r\n\r\n", b"GET /" + b"\xff" * 8191 + b" " + START[6:] + b"\r\n", b"GET /" + b"%" * 8191 + b" " + START[6:] + b"\r\n",
    b"GET http://" + b"a." * 4000 + b" " + START[6:] + b"\r\n", b"\r" * 32768, b"\n" * 32768, b"\0" * 32768, b"\r\r\n" * 10000,
    START + b"a: " + b"x" * 32000 + b"\x01\r\n\r\n", START + b"X-Forwarded-Proto: " + b"," * 32000 + b"\r\n\r\n",
    START[:16] + b"Host: " + b"a." * 16000 + b"!\r\n\r\n", START[:16] + b"Host: " + (b"a" * 61 + b"-.") * 500 + b"\r\n\r\n",
    START[:16] + b"Host: [" + b"0:" * 16000 + b"]\r\n\r\n", START[:16] + b"Host: " + b"1." * 16000 + b"\r\n\r\n",
    START + b"Content-Length: " + b"9" * 32000 + b"\r\n\r\n"], ids=lambda head: repr(head[:24] + b".." + head[-24:]))
def test_no_head_takes_long_or_much(head):
    """No 32 KB of input may ever cost more than milliseconds (a regular expression that backtracks takes seconds), fill the
    log with a line of more than some KB, or stay in the cache of answers."""
    rule, seconds = RedirectRule(keep_path=True), []
    for _ in range(3):
        start = time.perf_counter()
        result = owahttps.answer.__wrapped__(head, rule)
        owahttps.is_hopeless(head, 1)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1 and len(result.log) < 3 * owahttps.MAX_LOGGED + 50
    with serving(Quick) as server:
        before = owahttps.answer.cache_info().currsize
        assert statuses(ask(server, head + ONCE))
        assert owahttps.answer.cache_info().currsize <= before + 1      # ONCE itself


def test_caches_are_bounded():
    """A thousand names and as many different heads must never all be kept."""
    with serving() as server:
        heads = b"".join(b"GET / HTTP/1.1\r\nHost: h%d.example.com\r\n\r\n" % number for number in range(1500))
        assert len(statuses(ask(server, heads + ONCE))) == 1501
    assert owahttps.server_name.cache_info().currsize <= 1024 and owahttps.answer.cache_info().currsize <= 128


@pytest.mark.parametrize("bytes_", [
    b'" 200 0 "-" "-"\r\n6.6.6.6 - - [] "GET / HTTP/1.1', b"\n[x] owahttps: 6.6.6.6 refused: x\n", b"\x1b[31m", b'"', b"\\", b"\xff\x9b\xe2\x80\xa8",
    b"\0", b"\r", b"\x85", b"\t"], ids=repr)
def test_no_byte_of_the_network_forges_a_log_line(bytes_):
    """Whatever is in a request, one answer is one line of the access log, in printable ASCII, and no more than one line of errors."""
    with serving() as server:
        for request in (b"GET /a%s HTTP/1.1\r\nHost: h\r\n\r\n", b"GET / HTTP/1.1\r\nHost: h\r\nReferer: x%sy\r\n\r\n",
                        b"GET / HTTP/1.1\r\nHost: h\r\nUser-Agent: x%sy\r\n\r\n", b"GET / HTTP/1.1\r\nHost: h%s\r\n\r\n", b"G%s / HTTP/1.1\r\n\r\n"):
            access, errors = len(server.access_log), len(server.error_log)
            with contextlib.closing(connect(server, request % bytes_)) as sock:
                sock.shutdown(socket.SHUT_WR)
                count = len(statuses(read_all(sock)))
            assert len(server.access_log) == access + count and len(server.error_log) <= errors + 1
        for line in server.access_log:
            assert re.match(r'127\.0\.0\.1 - - \[[^]]*\] "[ !#-\[\]-~\\]*" [0-9]{3} [0-9]+ "[ !#-~]*" "[ !#-~]*"\n\Z', line)
        for line in server.error_log:
            assert re.match(r"\[[^]]*\] owahttps: 127\.0\.0\.1 refused: [ -~]*\n\Z", line)


# ---- Faults --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("where", ("setup", "handle", "handle_one_request", "address_string"))
def test_an_exception_in_the_handler_costs_one_connection_and_one_line(where):
    """A bug in a subclass must never end the server, nor hold its connection, nor put raw bytes into the log."""
    class Broken(RedirectHandler):
        pass

    def broken(self):
        if self.server.broken:
            self.server.broken -= 1
            raise ZeroDivisionError("\x1b\n")
        return getattr(super(Broken, self), where)()
    setattr(Broken, where, broken)
    RedirectServer.broken = 1
    try:
        with serving(Broken) as server:
            assert b"302" not in ask(server)
            assert is_whole(ask(server)) and wait_until(lambda: not server._connections)
            assert len(server.error_log) == 1 and re.match(r"\[.*\] owahttps: 127.0.0.1 error in line \d+: ZeroDivisionError\([ -~]*\n\Z",
                                                           server.error_log[0])
    finally:
        del RedirectServer.broken


def test_a_handler_that_closes_its_own_socket():
    """A socket that is closed behind the server's back must never end the server."""
    class Closing(RedirectHandler):
        def handle(self):
            super().handle()
            if b"away" in self.buffer:
                self.request.close()
                self.outgoing = b"x"
    with serving(Closing) as server:
        with contextlib.closing(connect(server, KEEP % 1)) as sock:
            assert sock.recv(9999).startswith(b"HTTP/1.1 302")
            sock.sendall(b"GET /away HTTP/1.1\r\n")
            read_all(sock)
        assert is_whole(ask(server)) and wait_until(lambda: not server._connections)


@pytest.mark.parametrize("jump", (-1e9, 1e9))
def test_a_clock_that_jumps_changes_no_deadline(jump, monkeypatch):
    """A step of the wall clock must never cut a connection that is not overdue, nor keep one that is."""
    class Half(RedirectHandler):
        head_seconds, idle_seconds = 0.3, 60.0
    with serving(Half) as server:
        with contextlib.closing(connect(server, KEEP % 1)) as idle, contextlib.closing(connect(server, b"GET")) as slow:
            assert idle.recv(9999).startswith(b"HTTP/1.1 302")
            start, now = time.monotonic(), time.time()
            monkeypatch.setattr(time, "time", lambda: now + jump)
            assert is_whole(ask(server))
            assert read_all(slow) == b"" and 0.2 < time.monotonic() - start < 3
            idle.sendall(ONCE)
            assert is_whole(read_all(idle))


def pipe_of_log(**options):
    reader, writer = os.pipe()
    told = []
    return reader, writer, told, owahttps.Log(writer, told.append)


def test_a_log_reader_that_stalls_costs_lines_and_they_are_counted():
    """write() must never wait, and every line is either read whole or counted as lost."""
    reader, writer, told, log = pipe_of_log()
    start = time.monotonic()
    for number in range(40000):
        log.write("line %d %s\n" % (number, "x" * 40))
    assert time.monotonic() - start < 5 and len(log.lines) <= log.WAITING
    chunks = []
    drain = threading.Thread(target=lambda: chunks.extend(iter(lambda: os.read(reader, 65536), b"")))
    drain.start()
    assert wait_until(lambda: told and not log.lines)
    log.write("last\n")
    log.close()
    os.close(writer)
    drain.join(10)
    os.close(reader)
    lines = b"".join(chunks).decode().split("\n")
    assert lines[-2:] == ["last", ""] and all(re.match("line [0-9]+ x{40}$", line) for line in lines[:-2])
    assert len(lines) - 1 + sum(int(re.match("([0-9]+) lines of the log were lost", text).group(1)) for text in told) == 40001


def test_a_log_reader_that_stalls_to_the_end():
    """close() must never wait for it, and what was under way counts as lost."""
    reader, writer, told, log = pipe_of_log()
    for number in range(4000):
        log.write("x" * 99 + "\n")
    assert wait_until(lambda: len(log.lines) < 4000)
    start = time.monotonic()
    log.close()
    assert time.monotonic() - start < 3
    lost = int(re.match("([0-9]+) lines of the log were lost", told[-1]).group(1))
    assert 4000 - 700 < lost <= 4000        # a pipe holds 64 KB, at the most
    os.close(reader)        # lets the log's thread go
    assert wait_until(lambda: not log._thread.is_alive())
    os.close(writer)


@linux
def test_a_log_that_recovers_glues_no_lines():
    """A write that was cut short must never make one line of two."""
    reader, writer, told, log = pipe_of_log()
    os.set_blocking(writer, False)
    for number in range(3000):
        log.write("x" * 99 + "\n")
    assert wait_until(lambda: told)
    read = os.read(reader, 1 << 20)
    log.write("after\n")
    assert wait_until(lambda: len(told) > 1)
    log.close()
    os.close(writer)
    read += os.read(reader, 1 << 20)
    os.close(reader)
    assert read.endswith(b"\nafter\n") and told[0].endswith("Resource temporarily unavailable") and "lines of the log were lost" in told[1]


@contextlib.contextmanager
def command(redirection="", *options, **popen):
    """serve as a process of its own, its shell's redirections or limits in front; (process, address)."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(["sh", "-c", redirection + ' exec "$@"', "sh", sys.executable, FILE, "serve",
                                "--bind", "127.0.0.1", "--port", str(port)] + list(options), **popen)

    def answers():
        try:
            socket.create_connection(("127.0.0.1", port), 5).close()
            return True
        except OSError:
            return process.poll() is not None
    try:
        assert wait_until(answers) and process.poll() is None
        yield process, type("Address", (), {"server_address": ("127.0.0.1", port)})
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()


def end(process, by=signal.SIGTERM):
    """Stop it; it must exit with 0 within 5 seconds."""
    start = time.monotonic()
    process.send_signal(by)
    err = process.communicate(timeout=10)[1]
    assert process.returncode == 0 and time.monotonic() - start < 5
    return err.decode() if err else ""


@linux
@pytest.mark.parametrize("redirection, told", [
    ("exec >&-;", ["standard output is closed"]), ("exec <&- >&-;", ["standard output is closed"]),
    ("exec >/dev/full;", ["log cannot be written, redirects go on", "20 lines of the log were lost"])])
def test_standard_output_that_cannot_be_written(redirection, told):
    """No redirect may be lost with the log; each fault is one line on standard error, and never a traceback."""
    with command(redirection, stderr=subprocess.PIPE) as (process, server):
        assert all(is_whole(ask(server)) for _ in range(20))
        err = end(process)
        assert all(err.count(text) == 1 for text in told) and "Traceback" not in err, err


@linux
def test_standard_output_whose_reader_exits():
    """A pipe that breaks must never end the server."""
    with command(stdout=subprocess.PIPE, stderr=subprocess.PIPE) as (process, server):
        assert is_whole(ask(server)) and b'"GET /once HTTP/1.1" 302' in process.stdout.readline()
        process.stdout.close()
        process.stdout = None
        assert all(is_whole(ask(server)) for _ in range(20))
        assert "Broken pipe" in end(process)


@linux
def test_standard_error_closed():
    """What would be told there must never go into the access log instead."""
    with command("exec 2>&-;", stdout=subprocess.PIPE) as (process, server):
        assert is_whole(ask(server)) and ask(server, b"\x16") == b"" and is_whole(ask(server, b"x\r\n\r\n"), b"400")
        process.send_signal(signal.SIGTERM)
        out = process.communicate(timeout=10)[0]
        assert process.returncode == 0 and re.match(rb'(127\.0\.0\.1 - - \[[^]]*\] "[^"]*" (302|400) .*\n){2}\Z', out), out


@linux
@pytest.mark.parametrize("reader_exits", (False, True))
def test_standard_error_stalled_from_the_start(reader_exits):
    """A full or broken pipe on standard error must never keep the server from starting, answering or ending."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    if reader_exits:
        os.close(reader)
    with command(stdout=subprocess.DEVNULL, stderr=writer) as (process, server):
        os.close(writer)
        assert all(is_whole(ask(server, b"x\r\n\r\n"), b"400") for _ in range(20))
        end(process)
    if not reader_exits:
        os.close(reader)


@linux
def test_sixty_four_file_descriptors():
    """Swamped beyond its descriptors, the server must never leave a normal client unanswered."""
    for options in ((), ("--max-connections", "5000")):
        with command("ulimit -n 64;", *options, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as (process, server):
            crowd = [connect(server) for _ in range(200)]
            assert all(is_whole(ask(server)) for _ in range(5))
            with open("/proc/%d/stat" % process.pid) as stat:
                ticks = sum(map(int, stat.read().rpartition(")")[2].split()[11:13]))
            assert ticks < 3 * os.sysconf("SC_CLK_TCK")
            for sock in crowd:
                sock.close()
            end(process)


@linux
@pytest.mark.parametrize("by", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_under_load_tears_no_answer(by):
    """Requests under way must get whole answers; the last one on a kept connection says that it is; nothing holds up the exit."""
    with command(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as (process, server):
        answers, torn, stop = [], [], threading.Event()

        def load(kept):
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    with contextlib.closing(connect(server)) as sock:
                        closing = False
                        while not closing and not stop.is_set():
                            sock.sendall(KEEP % 1 if kept else ONCE)
                            data = b""
                            while not is_whole(data):
                                chunk = sock.recv(65536)
                                if not chunk:
                                    break
                                data += chunk
                            if not is_whole(data):
                                torn.append(data)
                                break
                            answers.append(data)
                            closing = b"\r\nConnection: close\r\n" in data
        clients = [threading.Thread(target=load, args=(number % 2,)) for number in range(8)]
        for client in clients:
            client.start()
        halves = [connect(server, (KEEP % 2)[:number * 5]) for number in range(1, 8)]       # requests under way
        assert wait_until(lambda: len(answers) > 500)
        process.send_signal(by)
        wait_until(lambda: not any(client.is_alive() for client in clients), 0.1)
        for number, half in enumerate(halves):
            half.sendall((KEEP % 2)[(number + 1) * 5:])
            answer = read_all(half)
            assert is_whole(answer) and b"\r\nConnection: close\r\n" in answer
            half.close()
        end(process, by)
        stop.set()
        for client in clients:
            client.join(10)
        assert not [data for data in torn if data]


@linux
def test_a_signal_with_everything_stalled():
    """A stalled log, a stalled standard error and a client in the middle of a head must never keep the server from ending."""
    readers = [os.pipe(), os.pipe()]
    with command(stdout=readers[0][1], stderr=readers[1][1]) as (process, server):
        with contextlib.closing(connect(server, b"".join(KEEP % number for number in range(2000)) + b"x\r\n\r\n")) as sock:
            assert statuses(read_all(sock))[-1:] == [b"400"]
        with contextlib.closing(connect(server, b"GET / HT")), contextlib.closing(connect(server)):
            end(process)
    for pair in readers:
        for fd in pair:
            os.close(fd)
