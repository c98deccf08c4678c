# /// script
# requires-python = ">=3.6"
# dependencies = ["pytest"]
# ///
"""Tests of owahttps.py: tables of cases, real sockets on port 0, no network, no root.

    python3 -m pytest                     everything that this machine has the peers for
    python3 -m pytest -k "not servers"    without nginx, Apache, HAProxy and Caddy
"""
import ast
import contextlib
import faulthandler
import json
import os
import random
import re
import shutil
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from http.server import HTTPServer
from urllib.parse import urlsplit

import pytest

import owahttps
from owahttps import HostError, RedirectHandler, RedirectRule, RedirectServer, RuleError, running, server_name

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(HERE, "owahttps.py")
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a fault that only Linux shows this way")
DATE = b"Sun, 06 Nov 1994 08:49:37 GMT"
MAIL = "https://mail.example.com"


@pytest.fixture(autouse=True)
def nothing_hangs():
    """A test that hangs says where, and ends the run."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def run(*argv, **settings):
    """owahttps.py with these arguments: (exit code, standard output, standard error)."""
    done = subprocess.run([sys.executable, SCRIPT] + list(argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=30, **settings)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@contextlib.contextmanager
def serving(*argv, **settings):
    """`owahttps.py serve` as a process of its own, on a free loopback port: (process, port)."""
    process = subprocess.Popen([sys.executable, SCRIPT, "serve", "--bind", "127.0.0.1", "--port", "0"] + list(argv),
                               **dict(dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE), **settings))
    try:
        port = int(re.search(r"port (\d+);", process.stderr.readline().decode()).group(1))
        yield process, port
    finally:
        process.kill()
        process.communicate()


def ask(port, request, seconds=5):
    """All that comes back for these bytes, until the server closes."""
    if isinstance(request, str):
        request = request.encode("latin-1")
    with socket.create_connection(("127.0.0.1", port), seconds) as sock:
        sock.sendall(request)
        data = b""
        while True:
            chunk = sock.recv(65536)
            if not chunk:
                return data
            data += chunk


def get(target="/", host="mail.example.com", fields="", line="GET {} HTTP/1.1"):
    return "%s\r\nHost: %s\r\n%sConnection: close\r\n\r\n" % (line.format(target), host, fields)


def wait_for(condition, seconds=5):
    """Poll until condition() is true; its value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError("not within %g seconds" % seconds)


# ---- The rule --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("authority, name", [
    ("mail.example.com", "mail.example.com"), ("MAIL.Example.com:8080", "mail.example.com"), ("a", "a"), ("a.", "a"),
    ("a.:80", "a"), ("a_b-c.d", "a_b-c.d"), ("1a.2b", "1a.2b"), ("192.0.2.1:80", "192.0.2.1"), ("[::1]", "[::1]"),
    ("[2001:DB8::1]:65535", "[2001:db8::1]"), ("[::ffff:192.0.2.1]", "[::ffff:192.0.2.1]"), ("xn--bcher-kva.example", "xn--bcher-kva.example"),
    ("a" * 63 + ".b", "a" * 63 + ".b"), ("a." * 126 + "a", "a." * 126 + "a"), ("0x.example", "0x.example"), ("1.2.3.4.example:1", "1.2.3.4.example")])
def test_server_name(authority, name):
    assert server_name(authority) == name


@pytest.mark.parametrize("authority", [
    "", ".", "..", "a..", "a..b", ".a", "-a", "a-", "_a", "a:", "a:0", "a:65536", "a:123456", "a:b", "a:80:80", "a b", "a\t", "a\n", "\na",
    "a@b", "u:p@a", "a#b", "a?b", "a/b", "a\\b", "a,b", "a%b", "a%20b", '"a"', "'a'", "<a>", "a;b", "a|b", "{a}", "$a", "*", "*.a", "\xe9",
    "b\xfccher.example", "\u212a", "\u0661.example", "a\0", "a\x7f", "::1", "[::1", "::1]", "[::1]a", "[::1].", "[]", "[a]", "[::g]", "[1::2::3]",
    "[fe80::1%eth0]", "[fe80::1%25eth0]", "[v1.a]", "256", "1.2.3", "1.2.3.4.5", "256.1.1.1", "01.2.3.4", "1.2.3.0x4", "a.0x", "127.1", "a" * 64,
    "a." * 127 + "a"])
def test_server_name_refuses(authority):
    with pytest.raises(HostError) as caught:
        server_name(authority)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("fields, says", [
    (dict(path="exchange"), "path 'exchange'"), (dict(path=""), "path ''"), (dict(path="/a b"), "path '/a b'"), (dict(path='/"'), "path"),
    (dict(path="/%20"), "path"), (dict(path="/a?b"), "path"), (dict(path="/a\n"), "path"), (dict(path="/\xe9"), "path '/\\xe9'"),
    (dict(host="a b"), "'a b'"), (dict(host="https://a"), "'https://a'"), (dict(host="a:443"), "port"), (dict(host="[::1]:443"), "port"),
    (dict(allow_hosts=("a", "b:80")), "'b:80'"), (dict(allow_hosts=("a@b",)), "'a@b'"), (dict(status=303), "303"), (dict(status=200), "200"),
    (dict(https_port=0), "0"), (dict(https_port=65536), "65536"), (dict(health="health"), "'health'")])
def test_a_rule_that_cannot_be(fields, says):
    with pytest.raises(RuleError) as caught:
        RedirectRule(**fields)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("fields, name, target, location", [
    ({}, "a", "/x?y", "https://a/exchange"), (dict(path="/owa"), "[::1]", "/", "https://[::1]/owa"), (dict(host="B.example."), "a", "/", "https://b.example/exchange"),
    (dict(https_port=8443), "a", "/", "https://a:8443/exchange"), (dict(https_port=8443, host="[::1]"), "a", "/", "https://[::1]:8443/exchange"),
    (dict(keep_path=True), "a", "/x?y&z=/", "https://a/x?y&z=/"), (dict(keep_path=True), "a", "//b/x", "https://a//b/x"),
    (dict(keep_path=True), "a", "/%0d%0a%2f%C3%A9/../?", "https://a/%0d%0a%2f%C3%A9/../?"), (dict(keep_path=True), "a", "/%zz%", "https://a/%25zz%25"),
    (dict(keep_path=True), "a", '/\\"<>^`{|}[]\xe9', "https://a/%5C%22%3C%3E%5E%60%7B%7C%7D%5B%5D%E9"),
    ({}, "a", "/.well-known/acme-challenge/t", "https://a/.well-known/acme-challenge/t"), ({}, "a", "/.well-known/x", "https://a/exchange")])
def test_location(fields, name, target, location):
    assert RedirectRule(**fields).location(name, target) == location


def test_doctests():
    import doctest
    assert doctest.testmod(owahttps).attempted >= 2 and doctest.testmod(owahttps).failed == 0


def test_random_heads_never_break_a_location():
    """Whatever bytes come, a Location names the host that was asked for, in a URL that Python and the grammar both read."""
    rnd = random.Random(279681)
    pieces = ["GET", "POST", " ", " ", "/", "/x", "//", "http://", "a", "good.example", "evil", "@", "#", "?", "\\", ":", ":80", "[::1]", "%0d%0a", "%",
              "\r\n", "\r\n", "\r", "\n", "\t", "\0", "\x7f", "\xe9", ".", "..", " HTTP/1.1\r\nHost: ", " HTTP/1.0\r\n", "\r\nHost: ", "X: y\r\n", ",", "\"", "<"]
    redirected = 0
    for _ in range(20000):
        if rnd.random() < 0.5:
            text = "GET /%s HTTP/1.1\r\nHost: good.example%s\r\n\r\n" % tuple(
                "".join(rnd.choice(pieces) for _ in range(rnd.randrange(4))) for _ in range(2))
        else:
            text = "".join(rnd.choice(pieces) for _ in range(rnd.randrange(1, 16))) + "\r\n\r\n"
        head = text.encode("latin-1")
        head = head[:head.index(b"\r\n\r\n") + 4]
        for rule in (RedirectRule(), RedirectRule(keep_path=True)):
            result = owahttps.answer(head, rule)
            match = re.search(rb"\r\nLocation: ([^\r]*)\r\n", result.rest.partition(b"\r\n\r\n")[0] + b"\r\n")
            if not match:
                assert result.refusal or result.start.startswith((b"HTTP/1.1 204", b"HTTP/1.1 200"))
                continue
            redirected += 1
            url = urlsplit(match.group(1).decode())
            asked = re.search(rb"(?i)^[^ ]+ https?://([^/?#]*)", head.lstrip()) or re.search(rb"(?i)\r\nhost:[ \t]*([^\r\t ]*)", head)
            assert url.scheme == "https" and "@" not in url.netloc and url.netloc == server_name(asked.group(1).decode("latin-1"))
            assert re.fullmatch(r"(?:[A-Za-z0-9._~:/?@!$&'()*+,;=\[\]-]|%[0-9A-Fa-f]{2})+", match.group(1).decode())
    assert redirected > 1000


# ---- The answer, through both servers --------------------------------------------------------------------------------

class StockServer(socketserver.ThreadingMixIn, HTTPServer):
    """What http.server calls ThreadingHTTPServer since Python 3.7."""
    daemon_threads = True


CASES = list(owahttps.cases())


@pytest.fixture(scope="module")
def token_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("acme")
    (folder / "a-Token_1").write_text("a-Token_1.thumbprint")
    with contextlib.suppress(OSError, NotImplementedError):
        os.symlink(str(folder / "a-Token_1"), str(folder / "link"))
    return str(folder)


def test_both_servers_answer_every_case_alike(monkeypatch, token_folder):
    """The handler under the stock threading server and under ours: the same bytes, and those that the table expects."""
    monkeypatch.setattr(owahttps, "_dates", lambda now: (DATE, "06/Nov/1994:08:49:37 +0000"))
    rules = (RedirectRule(), RedirectRule(host="mail.example.com", https_port=8443, status=308, path="/owa"),
             RedirectRule(keep_path=True, allow_hosts=("mail.example.com",), health="/health", acme_dir=token_folder))
    for rule in rules:
        stock = StockServer(("127.0.0.1", 0), RedirectHandler)
        stock.rule = rule
        with running(stock) as (_, stock_port), running(RedirectServer(("127.0.0.1", 0), rule=rule)) as (_, port):
            for case in CASES:
                ours = owahttps._conversation(("127.0.0.1", port), case.request, 3)
                assert ours == owahttps._conversation(("127.0.0.1", stock_port), case.request, 3), case.what
                if owahttps._applies(case, rule):
                    assert owahttps._answers(ours, case.request) in owahttps._expected(case, rule).split("|"), case.what
                if ours:
                    assert ours.count(b"\r\nDate: " + DATE + b"\r\n") == ours.count(b"HTTP/1.1 ")
                    assert b"\r\nServer: owahttps\r\n" in ours and b"\r\nConnection: close\r\n" in ours


def test_the_answer_to_the_byte():
    result = owahttps.answer(b"GET / HTTP/1.1\r\nHost: a&b.example\r\n\r\n".replace(b"&", b"-"), RedirectRule())
    body = (b'<!DOCTYPE html>\n<title>Object moved</title>\n<h1>Object moved</h1>\n'
            b'<p>This object may be found <a href="https://a-b.example/exchange">here</a>.\n')
    assert result.start + DATE + result.rest == (
        b"HTTP/1.1 302 Found\r\nDate: " + DATE + b"\r\nServer: owahttps\r\nLocation: https://a-b.example/exchange\r\n"
        b"Content-Type: text/html; charset=utf-8\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert not result.close and result.log == '"GET / HTTP/1.1" 302 %d "-" "-"' % len(body)


@pytest.mark.parametrize("head, status, has", [
    ("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", 302, b"Content-Length: 1"), ("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 204, b"Allow: GET, HEAD"),
    ("TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", 405, b"Allow: GET, HEAD"), ("GET / HTTP/1.0\r\nHost: a\r\n\r\n", 302, b"Connection: close"),
    ("GET / HTTP/1.2\r\nHost: a\r\n\r\n", 302, b"Location: https://a/"), ("GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-Proto: HTTPS, http\r\n\r\n", 421, b"redirect loop"),
    ("GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-Proto: http, https\r\n\r\n", 302, b"Location: https://a/"), ("GET / HTTP/1.1\r\nhOST:a \t\r\n\r\n", 302, b"https://a/"),
    ("GET / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\n", 400, b"Content-Length"), ("GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n\r\n", 400, b"Content-Length"),
    ("GET http://a?b HTTP/1.1\r\nHost: x\r\n\r\n", 302, b"https://a/?b\r\n"), ("GET HTTPS://A:1/ HTTP/1.1\r\nHost: x\r\n\r\n", 302, b"https://a/\r\n"),
    ("GET http:///x HTTP/1.1\r\nHost: x\r\n\r\n", 400, b"not one server name"), ("GET http://a/ HTTP/1.1\r\nHost: \r\n\r\n", 400, b"not one server name"),
    ("GET /\xe9 HTTP/1.1\r\nHost: a\r\n\r\n", 302, b"https://a/%E9\r\n"), ("GET /'&<a HTTP/1.1\r\nHost: a\r\n\r\n", 302, b"&#x27;&amp;%3Ca\""),
    ("G@T / HTTP/1.1\r\nHost: a\r\n\r\n", 400, b"malformed request line"), ("GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400, b"malformed request line"),
    ("GET / http/1.1\r\nHost: a\r\n\r\n", 400, b"malformed request line"), ("\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"[:4], 400, b"malformed request line")])
def test_answers(head, status, has):
    result = owahttps.answer(head.encode("latin-1"), RedirectRule(keep_path=True))
    assert result.start.startswith(b"HTTP/1.1 %d " % status) and has in result.rest
    assert result.rest.endswith(b"\r\n\r\n") == (head[:4] in ("HEAD", "OPTI"))


@pytest.mark.parametrize("size, status", [(owahttps.MAX_TARGET, 302), (owahttps.MAX_TARGET + 1, 414)])
def test_the_longest_target(size, status):
    assert owahttps.answer(b"GET %s HTTP/1.1\r\nHost: a\r\n\r\n" % b"/".ljust(size, b"a"), RedirectRule()).start[9:12] == b"%d" % status


@pytest.mark.parametrize("size, status", [(owahttps.MAX_HEAD, 302), (owahttps.MAX_HEAD + 1, 431)])
def test_the_longest_head(size, status):
    start, end = b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"\r\n\r\n"
    head = start + b"x" * (size - len(start) - len(end)) + end
    assert len(head) == size and owahttps.answer(head, RedirectRule()).start[9:12] == b"%d" % status


@pytest.mark.parametrize("begun, hopeless", [
    ("", False), ("G", False), ("GET / HTTP/1.1", False), ("GET / HTTP/1.1\r", False), ("GET / HTTP/1.1\r\n", False), ("\r\n", False), ("\r\nGET", False),
    ("GET / HTTP/1.1\r\nHost: a\r\n", False), ("GET /\r\n", True), ("GET / HTTP/1.1\n", True), ("GET / HTTP/1.1\r\nHost: a\n", True), ("\n", True), ("\x16", True),
    ("\r\n\r", False), ("x" * (owahttps.MAX_TARGET + 65), True), ("GET / HTTP/1.1\r\nX: " + "x" * owahttps.MAX_HEAD, True), ("GET / HTTP/2.0\r\n", True)])
def test_is_hopeless(begun, hopeless):
    """A head is refused as soon as it can never be right, however its bytes are cut into packets; else it may go on."""
    data = begun.encode()
    assert owahttps.is_hopeless(data, len(data)) == hopeless
    if hopeless:
        assert owahttps.answer(data, RedirectRule()).refusal


@pytest.mark.parametrize("target, referer, agent, log", [
    ("/a\"b", 'x" 200 0 "', "\x1b[31m", '"GET /a\\x22b HTTP/1.1" 302 {} "x\\x22 200 0 \\x22" '), ("/\xe9\\", "\xff\t", "ok", '"GET /\\xE9\\x5C HTTP/1.1" 302 {} "\\xFF" "ok"')])
def test_log_lines_cannot_be_forged(target, referer, agent, log):
    """No byte of a request may end a quoted part, begin a line, or reach the terminal raw."""
    head = "GET %s HTTP/1.1\r\nHost: a\r\nReferer: %s\r\nUser-Agent: %s\r\n\r\n" % (target, referer, agent)
    result = owahttps.answer(head.encode("latin-1"), RedirectRule())
    assert re.fullmatch(r'"[ !#-\[\]-~\\]*" \d{3} \d+ "[^"]*" "[^"]*"', result.log) and result.log.isprintable()
    if not result.refusal:
        assert result.log.startswith(log.format(result.log.split(" ")[4]))


# ---- The listener ----------------------------------------------------------------------------------------------------

COMBINED = r'127\.0\.0\.1 - - \[\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\] "GET /x HTTP/1\.1" 302 \d+ "http://r/" "agent"\n'


def test_serve_tells_where_and_logs_in_combined_format():
    with serving("--path", "/owa") as (process, port):
        assert b"Location: https://mail.example.com/owa\r\n" in ask(port, get("/x", fields="Referer: http://r/\r\nUser-Agent: agent\r\n"))
        assert re.fullmatch(COMBINED, process.stdout.readline().decode())
        assert b" 400 " in ask(port, get(host="a@b"))
        assert re.fullmatch(r"\[[^]]+\] owahttps: 127\.0\.0\.1 refused: not one server name and port in Host or target\n",
                            next(line for line in iter(lambda: process.stderr.readline().decode(), "") if "warning" not in line))
        process.send_signal(signal.SIGTERM if os.name != "nt" else signal.CTRL_BREAK_EVENT)
        assert process.wait(5) == 0


@pytest.mark.parametrize("argv, code, says", [
    (["serve", "--port", "70000"], 2, "'70000' is not a port"), (["serve", "--port", "x"], 2, "'x'"), (["serve", "--path", "owa"], 2, "path 'owa'"),
    (["serve", "--host", "a b"], 2, "'a b'"), (["serve", "--status", "303"], 2, "303"), (["serve", "--acme-dir", "/no/such"], 2, "/no/such"),
    (["serve", "--bind", "203.0.113.9", "--port", "0"], 1, "203.0.113.9"), (["serve", "--bind", "no.such.invalid", "--port", "0"], 1, "no.such.invalid"),
    (["serve", "--prot", "80"], 2, "--port"), (["sevre"], 2, "serve"), (["generate", "ngnix"], 2, "nginx"), (["generate", "--keep-path"], 2, "--keep-path"),
    (["generate", "--status", "301"], 2, "301"), (["generate", "--allow-host", "a"], 2, "--allow-host"), (["generate", "--path", "/"], 2, "virtual directory"),
    (["generate", "exchange2019"], 2, "--host"), (["generate", "exchange2007", "--host", "a", "--status", "308"], 2, "308|301 or 302 or 307"),
    (["generate", "haproxy", "--acme-dir", "/a"], 2, "HAProxy serves no files"), (["generate", "nginx", "--acme-dir", "a"], 2, "--acme-dir"),
    (["generate", "nginx", "--asp"], 2, "no such part"), (["generate", "--write", "/no/such"], 1, "/no/such"), (["selftest", "--path", "/x"], 2, "--against"),
    (["selftest", "--against", "nonsense"], 2, "nonsense"), (["check"], 3, "TARGET"), (["check", "a b"], 3, "'a b'"), (["check", "https://a"], 3, "https"),
    (["check", "a", "--ca-file", "/no/such"], 3, "/no/such"), (["check", "--tmieout", "3", "a"], 3, "--timeout"), (["demo", "--cert", "/no/such"], 2, "/no/such")])
def test_errors_are_one_line(argv, code, says):
    got, out, err = run(*argv)
    assert (got, out) == (code, "") and err.count("\n") == 1 and "Traceback" not in err
    assert any(one in err for one in says.split("|")), err


@pytest.mark.skipif(not hasattr(os, "geteuid") or not sys.platform.startswith("linux"), reason="privileged ports are Linux's here")
def test_cannot_bind():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        code, _, err = run("serve", "--bind", "127.0.0.1", "--port", str(taken.getsockname()[1]))
    assert code == 1 and "is in use" in err and "ss -ltnp" in err
    assert all(way in owahttps._bind_trouble(PermissionError(13, "no"), "", 80) for way in ("CAP_NET_BIND", "ip_unprivileged_port_start", "--user"))


@pytest.mark.parametrize("fields, host, says", [
    ({}, "127.0.0.1", []), (dict(status=301), "127.0.0.1", ["301"]), (dict(status=308), "::1", ["308"]), (dict(status=308), "192.0.2.1", []),
    (dict(https_port=8443), "127.0.0.1", ["Let's Encrypt"]), (dict(https_port=8443, acme_dir="/x"), "127.0.0.1", [])])
def test_warnings(monkeypatch, fields, host, says):
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    warnings = list(owahttps._warnings(RedirectRule(**fields), host, user=""))
    assert len(warnings) == len(says) and all(word in line for word, line in zip(says, warnings))
    monkeypatch.setattr(os, "geteuid", lambda: 0, raising=False)
    assert any("root" in line for line in owahttps._warnings(RedirectRule(), "::", user=""))
    assert not any("root" in line for line in owahttps._warnings(RedirectRule(), "::", user="nobody"))


def test_every_address_in_one_socket():
    """The default bind answers IPv4 and, where there is any, IPv6; an IPv4 client's address is written as one."""
    lines = []
    log = type("Log", (), {"write": lambda self, line: lines.append(line)})()
    with running(RedirectServer(("", 0), access_log=log)) as (_, port):
        assert b"302 Found" in ask(port, get())
        if socket.has_ipv6:
            with contextlib.suppress(OSError):
                with socket.create_connection(("::1", port), 5) as sock:
                    sock.sendall(get(host="[::1]:80").encode())
                    assert b"Location: https://[::1]/exchange" in sock.recv(65536)
    assert lines[0].startswith("127.0.0.1 - - [")


def test_the_server_is_an_honest_httpserver():
    with RedirectServer(("127.0.0.1", 0), rule=RedirectRule(path="/owa")) as server:
        assert isinstance(server, HTTPServer) and server.server_port == server.server_address[1] > 0
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        assert b"/owa\r\n" in ask(server.server_port, get())
        server.shutdown()
        thread.join(5)
        assert not thread.is_alive()


# ---- Recipes ---------------------------------------------------------------------------------------------------------

ARTICLE = """\
<%
      If Request.ServerVariables("SERVER_PORT")=80 Then
         Dim strSecureURL
         strSecureURL = "https://"
         strSecureURL = strSecureURL & Request.ServerVariables("SERVER_NAME")
         strSecureURL = strSecureURL & "/exchange"
         Response.Redirect strSecureURL
      End If
   %>
"""


def test_the_articles_page_to_the_letter():
    assert run("generate", "--asp") == (0, ARTICLE.replace("\n", os.linesep), "")


@pytest.mark.parametrize("fields, http_port, line", [
    (dict(path="/owa"), 80, 'strSecureURL & "/owa"'), (dict(host="mail.example.com"), 80, 'strSecureURL & "mail.example.com"'),
    (dict(https_port=8443), 80, 'strSecureURL & ":8443/exchange"'), ({}, 8080, '("SERVER_PORT")=8080 Then')])
def test_the_page_follows_the_rule(fields, http_port, line):
    assert line in owahttps.asp_page(RedirectRule(**fields), http_port)


def test_the_articles_steps():
    """IIS's labels exact, eighteen steps in order, both notes, and nothing of the article's prose."""
    code, out, _ = run("generate", "--steps")
    assert code == 0 and [int(n) for n in re.findall(r"(?m)^ ?(\d+)\. ", out)] == list(range(1, 19))
    for label in ("Owahttps.asp", "Inetpub\\Wwwroot\\Owaasp", "Internet Service Manager", "Default Web Site", "Exchange folder", "Properties", "Custom Errors",
                  "403.4", "Message Type", "URL", "/owaasp/owahttps.asp", "Directory Security", "Secure Communications", "Edit", "Require 128-bit encryption",
                  "Require secure channel (SSL)", "net stop iisadmin /y", "SERVER_PORT and SERVER_NAME", "Only the Exchange folder"):
        assert label in out, label
    assert "owa folder" in run("generate", "--steps", "--path", "/owa")[1] and "SSL for all incoming" not in out


def test_write_never_overwrites(tmp_path):
    page = tmp_path / "Owahttps.asp"
    for _ in range(2):
        code, out, _ = run("generate", "--asp", "--write", str(tmp_path))
        assert code == 0 and page.read_bytes() == ARTICLE.replace("\n", "\r\n").encode()
    page.write_bytes(b"mine")
    code, _, err = run("generate", "--write", str(tmp_path))
    assert code == 1 and err.count("\n") == 1 and str(page) in err and page.read_bytes() == b"mine"


EXCHANGES = [(name, method) for name, (_, marks) in owahttps.EXCHANGE.items() for method in (("",) if "A" in marks else ("redirect", "403.4"))]


@pytest.mark.parametrize("name, method", EXCHANGES)
def test_exchange_recipes(name, method):
    """Every part is there, filled in, in ASCII; what must never be printed for a version is not."""
    parts = {part.name: part.text for part in owahttps.exchange(name, RedirectRule(path="/owa", host="mail.example.com"), 80, method or "redirect", 3)}
    assert {"about", "steps", "script", "undo", "verify"} <= set(parts) and ("asp" in parts) == (not method)
    text = "".join(parts.values())
    assert "https://mail.example.com/owa" in text and not re.search(r"(?<!%)\{[a-z_]+\}", text) and text.isascii() if hasattr(text, "isascii") else True
    assert "owahttps.py check mail.example.com --path /owa" in parts["verify"]
    assert "Exchange Back End" not in parts["script"] + parts["undo"] and "redirectHttpToHttps" not in text
    assert not (name == "exchange2007" and "responseMode='Redirect'" in text)
    assert ("CustomErrorModule\" />" in parts["about"]) == (name in ("exchange2016", "exchange2019", "exchange-se"))
    if method:
        assert "add backup" in parts["script"] and "/commit:apphost" in parts["script"] or "-commit:apphost" in parts["script"]
    else:
        assert "W3SVC/3/ROOT" in parts["script"] and "adsutil" not in parts["script"] and "Merge \"403,4,URL,/owaasp/owahttps.asp\"" in parts["script"]
        assert "net stop iisadmin /y" in parts["script"] and "iisreset" not in parts["script"] and "NOT started again" in parts["script"]


HOSTILE = ['a"b', "a%>b", "a%b", "%PATH%", "a&calc", "a|b", "a>b", "a^b", "a'b", "a`b", "a$(b)", "a;b", "a\nb", "a!b", "a{b}", "a" * 300, "a b", "<%", "$host", "a\\b"]


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_values_reach_no_script(value):
    """Quoting of cmd.exe, PowerShell, VBScript and every server: no value that it could break ever makes a rule."""
    for fields in (dict(host=value), dict(path="/" + value), dict(health="/" + value), dict(allow_hosts=(value,))):
        if len(value) < 300 or "path" not in fields and "health" not in fields:
            with pytest.raises(RuleError):
                RedirectRule(**fields)


def test_generate_list_and_parts():
    code, out, _ = run("generate", "--list")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == list(owahttps.RECIPES)
    script = run("generate", "exchange2019", "--host", "mail.example.com", "--script")[1]
    assert script.startswith("@echo off") and "https://mail.example.com/owa" in script
    assert run("generate", "nginx")[1].startswith("#") and "----" not in run("generate", "nginx")[1]


def test_the_systemd_unit(tmp_path):
    unit = tmp_path / "owahttps.service"
    text = run("generate", "systemd", "--host", "mail.example.com", "--allow-host", "a.b", "--keep-path")[1]
    assert "serve --port 80 --host mail.example.com --keep-path --allow-host mail.example.com --allow-host a.b\n" in text
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze here")
    unit.write_text(text.replace("/usr/bin/python3 -I /usr/local/bin/owahttps.py", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0 and b"owahttps" not in done.stdout, done.stdout


# ---- The self-test, sabotaged ----------------------------------------------------------------------------------------

def failing():
    return [(what, expected, got) for what, expected, got in owahttps.try_ourselves() if got not in expected.split("|")]


def test_selftest_passes_in_time():
    start = time.monotonic()
    code, out, err = run("selftest")
    assert (code, err) == (0, "") and time.monotonic() - start < 5
    assert out.splitlines()[-1] == "%d checks, 0 failed" % out.count("ok   ") and "\033" not in out


class WrongCertificate(owahttps.StubServer):
    """Trusts nothing that the self-test knows."""

    def __init__(self, *args, **fields):
        super().__init__(*args, **fields)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)      # no certificate at all


class DeadStub(owahttps.StubServer):
    def verify_request(self, request, client_address):
        return False


def sabotaged_rule(**wrong):
    return type("Sabotaged", (RedirectRule,), {"__new__": lambda cls, *args, **fields: super(RedirectRule, cls).__new__(
        cls, *RedirectRule(*args, **dict(fields, **wrong)))})


@pytest.mark.parametrize("name, value, must_fail", [
    ("RedirectRule", sabotaged_rule(status=301), "plain HTTP is redirected"),
    ("RedirectRule", sabotaged_rule(host="evil.example"), "plain HTTP is redirected"),
    ("RedirectRule", sabotaged_rule(path="/owa"), "plain HTTP is redirected"),
    ("StubServer", WrongCertificate, "the stub's page comes over verified TLS"), ("StubServer", DeadStub, "check finds nothing wrong"),
    ("RedirectRule.location", lambda self, name, target: "http://%s:%d/exchange" % (name, self.https_port), "plain HTTP is redirected"),
    ("RedirectRule.location", lambda self, name, target: "https://" + name + target, "Host with a port"),
    ("server_name", lambda authority: authority, "Host with '@'"), ("RedirectServer", None, "plain HTTP is redirected")],
    ids=["status", "host", "path", "certificate", "dead stub", "http Location", "fixed path", "any Host", "no redirect"])
def test_sabotage_turns_the_selftest_red(monkeypatch, name, value, must_fail):
    """Each part broken on purpose: a self-test that stays green proves nothing."""
    if value is None:
        value = lambda address, rule: owahttps._HTTPServer(address, owahttps.BeforeHandler)     # noqa: E731
    owner, _, attribute = name.rpartition(".")
    monkeypatch.setattr(getattr(owahttps, owner) if owner else owahttps, attribute, value)
    owahttps.answer.cache_clear()
    red = [what for what, _, _ in failing()]
    owahttps.answer.cache_clear()
    assert must_fail in red


def test_selftest_fails_by_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(owahttps, "STUB_CERTIFICATE", owahttps.STUB_CERTIFICATE.replace("MIIB0j", "MIIB1j"))
    monkeypatch.setattr(owahttps, "try_end_to_end", lambda: iter([("a", "b|c", "d"), ("e", "f", "f")]))
    assert owahttps.main(["selftest", "--quiet"]) == 1
    out = capsys.readouterr().out
    assert "FAIL      a: expected b|c, got d" in out and out.endswith("1 failed\n") and "ok  " not in out


# ---- The text and its promises ---------------------------------------------------------------------------------------

def source():
    with open(SCRIPT, encoding="utf-8") as file:
        return file.read()


def test_size_is_a_feature():
    lines = source().splitlines()
    assert len(lines) <= CAP and max(map(len, lines)) <= 120


CAP = 2400


def test_nothing_is_used_before_it_is_defined():
    """The file reads top to bottom: what a function or class uses stands above it."""
    defined, early = {}, []
    tree = ast.parse(source())
    for node in tree.body:
        for name in [getattr(node, "name", None)] + [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]:
            defined.setdefault(name, node.lineno)
    for node in tree.body:
        for use in ast.walk(node):
            if isinstance(use, ast.Name) and defined.get(use.id, 0) > node.lineno and use.id != getattr(node, "name", ""):
                early.append((getattr(node, "name", "line %d" % node.lineno), use.id))
    assert early == []


def test_imports_are_the_standard_librarys():
    roots = set()
    for node in ast.walk(ast.parse(source())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            roots.add(node.module.split(".")[0])
    if hasattr(sys, "stdlib_module_names"):
        assert roots <= sys.stdlib_module_names
    done = subprocess.run([sys.executable, "-S", "-E", "-s", "-c", "import owahttps"], cwd=HERE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()       # without site-packages


def test_all_is_what_it_says():
    assert all(hasattr(owahttps, name) for name in owahttps.__all__)
    for name in owahttps.__all__:
        assert getattr(owahttps, name).__doc__, name


def readme():
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        return file.read()


def help_of(command):
    return run(*([command] if command else []) + ["--help"])[1]


def test_the_readmes_commands_and_options_exist():
    """Every command line and option in the README is one, and every option of --help is in the README."""
    text = readme()
    commands = set(re.findall(r"python3 owahttps\.py ([a-z]+)\b", text))
    assert commands == {"serve", "generate", "check", "selftest", "demo"}
    every = {command: set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", help_of(command))) for command in commands}
    everywhere = set().union(*every.values())
    others = {"--against", "--cacert", "--version"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - others <= everywhere
    assert everywhere - {"--help"} <= set(re.findall(r"--[a-z][a-z-]+", text))
    for line in re.findall(r"(?m)^\$ .*owahttps\.py (.*?)(?: *#.*| &| >.*)?$", text):
        words = line.split()
        assert {word for word in words if word.startswith("--")} <= every[words[0]], line


def test_the_readme_names_what_servers_do_otherwise():
    for what in DIFFERS:
        assert "| %s |" % what in readme(), what
    for line in run("generate", "--list")[1].splitlines():
        assert line in readme()


@pytest.mark.parametrize("command", ["", "serve", "generate", "check", "selftest", "demo"])
def test_help_fits_a_screen(command):
    text = help_of(command)
    assert len(text.splitlines()) <= 50 and (not command or "examples:" in text) and "==SUPPRESS==" not in text
    assert run()[1] == help_of("")


def test_version():
    assert run("--version") == (0, "owahttps %s%s" % (owahttps.__version__, os.linesep), "")


# ---- Every box -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", ["-I", "-O", "-OO", "-bb", "-Werror", "-Xdev", "-S", "-B"])
def test_flags(flags):
    if flags == "-Xdev":
        flags = ["-X", "dev", "-W", "error"]
    done = subprocess.run([sys.executable] + ([flags] if isinstance(flags, str) else flags) + [SCRIPT, "selftest", "--quiet"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"") and b" 0 failed" in done.stdout


def test_from_anywhere(tmp_path):
    """From a folder with spaces and letters beyond ASCII, that cannot be written; from standard input; as a module; and
    nothing is left beside the file."""
    folder = tmp_path / "a b \xe9"
    folder.mkdir()
    shutil.copy(SCRIPT, str(folder))
    os.chmod(str(folder), 0o555)
    bare = {name: value for name, value in os.environ.items() if name in ("PATH", "SYSTEMROOT", "TEMP", "TMP")}
    try:
        for argv, settings in (([str(folder / "owahttps.py")], dict(env=dict(bare, LANG="C", LC_ALL="C"))),
                               (["owahttps.py"], dict(cwd=str(folder), env=dict(bare, LC_ALL="C"))),
                               (["-B", "-m", "owahttps"], dict(cwd=str(folder))), (["-"], dict(input=source().encode()))):
            done = subprocess.run([sys.executable] + argv + ["selftest", "--quiet"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings)
            assert (done.returncode, done.stderr) == (0, b"") and b" 0 failed" in done.stdout
    finally:
        os.chmod(str(folder), 0o755)
    assert os.listdir(str(folder)) == ["owahttps.py"]


def test_output_that_cannot_be_written():
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb") as full:
            done = subprocess.run([sys.executable, SCRIPT, "generate"], stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == 1 and done.stderr.decode() == "owahttps: error: No space left on device\n"
    process = subprocess.Popen([sys.executable, SCRIPT, "generate"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(10) == 1
    process.stderr.close()


def test_colour_is_for_terminals(monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert owahttps._paint("ok") == "ok"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert owahttps._paint("ok") == "\033[32mok\033[m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert owahttps._paint("ok") == "ok"


# ---- Other servers ---------------------------------------------------------------------------------------------------

def find(*names):
    return next((path for path in (shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") for name in names) if path), None)


NGINX = """daemon off; worker_processes 1; pid {dir}/nginx.pid; error_log {dir}/error.log;
events {{}}
http {{ access_log {dir}/access.log; client_body_temp_path {dir}/b; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f;
  uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  {text}
}}
"""
APACHE = """ServerRoot {dir}
PidFile {dir}/pid
ErrorLog {dir}/error.log
DefaultRuntimeDir {dir}
ServerName plain.invalid
<IfFile /usr/lib/apache2/modules/mod_mpm_event.so>
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
</IfFile>
LoadModule rewrite_module /usr/lib/apache2/modules/mod_rewrite.so
LoadModule alias_module /usr/lib/apache2/modules/mod_alias.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
{text}
"""
# Each server: its program, what goes round its recipe, its own syntax check, how it is started.
PEERS = {
    "nginx": (("nginx",), NGINX, ["-t", "-q", "-c", "{conf}"], ["-c", "{conf}"]),
    "apache": (("apache2", "httpd"), APACHE, ["-t", "-f", "{conf}"], ["-X", "-f", "{conf}"]),
    "haproxy": (("haproxy",), "{text}", ["-c", "-q", "-f", "{conf}"], ["-db", "-f", "{conf}"]),
    "caddy": (("caddy",), "{{\n\tadmin off\n}}\n{text}", ["validate", "--adapter", "caddyfile", "--config", "{conf}"],
              ["run", "--adapter", "caddyfile", "--config", "{conf}"])}


@contextlib.contextmanager
def peer(name, text, port, folder):
    """A server of the machine's own, with this configuration, on this loopback port; skips by name without it."""
    programs, around, check, start = PEERS[name]
    program = find(*programs)
    if not program:
        pytest.skip("no %s here" % name)
    conf = os.path.join(folder, name + ".conf")
    text = re.sub(r"(?m)^    (user|group) haproxy\n", "", text) if os.geteuid() else text
    with open(conf, "w") as file:
        file.write(around.format(dir=folder, text=text))
    environment = dict(os.environ, HOME=folder, XDG_DATA_HOME=folder, XDG_CONFIG_HOME=folder)
    done = subprocess.run([program] + [word.format(conf=conf) for word in check], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=environment)
    assert done.returncode == 0, done.stdout.decode()
    process = subprocess.Popen([program] + [word.format(conf=conf) for word in start], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env=environment)
    try:
        wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", port)), 15)
        yield
    finally:
        process.terminate()
        process.wait(10)


def free_port():
    """A port that is free now, outside the range from which the system takes its own."""
    while True:
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", random.randrange(20000, 30000)))
            return sock.getsockname()[1]


def failures(port, rule):
    results = owahttps.try_cases(("127.0.0.1", port), rule, seconds=1)
    return {what for what, expected, got in results if got not in expected.split("|")}


# What a recipe's server does otherwise than the decision, from the README's table: N nginx, A Apache, H HAProxy, C Caddy.
DIFFERS = {
    'unknown method': "N", 'OPTIONS *': "NAHC", 'GET *': "C", 'Expect: 100-continue gets the final answer': "N",
    'Host in capitals': "C", 'IPv6 Host': "C", 'IPv6 Host that is none': "NHC",
    'Host that ends in a number, but is no IPv4 address': "NHC", 'Host with a label of 64': "NAHC",
    'Host of 254 characters': "NAHC", 'Host port 0': "NHC", 'Host port 65536': "NHC",
    'Host port that is no number': "NH", 'no Host, HTTP/1.0, with a fixed host': "HC", 'two Hosts, equal': "H",
    'folded field line': "AHC", 'lone LF in the head': "NHC", "lone LF at every line's end": "NHC",
    'NUL in the head': "H", 'DEL in the head': "NH", 'field line without a colon': "N",
    'absolute form goes before Host': "H", 'absolute form without a path': "AH", 'absolute form with userinfo': "C",
    'absolute form, other scheme': "NHC", 'target with a fragment': "NC", 'HTTP/0.9': "NA", 'HTTP/2 preface': "HC",
    'HTTP/3.7': "AH", 'TLS ClientHello': "AC", 'one leading empty line': "C",
    'Content-Length and Transfer-Encoding': "AHC", 'target of 9,000 bytes': "HC", 'head of 40,000 bytes': "C",
    'path and query, byte for byte': "N", "outside the URL's grammar is encoded": "NAH",
    'ACME token that is none': "NAC", 'ACME token through a symbolic link': "NAC"}


RULES = [RedirectRule(), RedirectRule(keep_path=True, status=308), RedirectRule(host="mail.example.com", https_port=8443, path="/owa"),
         RedirectRule(allow_hosts=("mail.example.com",), health="/health", acme_dir="{tokens}")]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: owahttps.options(rule).replace(" ", "") or "default")
@pytest.mark.parametrize("name", list(PEERS))
def test_servers(name, rule, tmp_path, token_folder):
    os.chmod(str(tmp_path), 0o755)
    for folder in (token_folder, os.path.dirname(token_folder), os.path.dirname(os.path.dirname(token_folder))):
        os.chmod(folder, 0o755)         # the servers read as users of their own
    rule = rule._replace(acme_dir=token_folder if rule.acme_dir and name != "haproxy" else "")
    port = free_port()
    text = owahttps.server(name, rule, port)[0].text
    with peer(name, text, port, str(tmp_path)):
        assert failures(port, rule) - {what for what, servers in DIFFERS.items() if name[0].upper() in servers} == set()
