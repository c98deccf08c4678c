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
import errno
import faulthandler
import io
import json
import os
import random
import re
import select
import selectors
import shutil
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections import deque
from http.server import HTTPServer
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Union
from urllib.parse import urlsplit

import pytest

import owahttps
from owahttps import (
    HostError,
    RedirectHandler,
    RedirectRule,
    RedirectServer,
    RuleError,
    running,
    server_name,
)

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(HERE, "owahttps.py")
os.environ["COLUMNS"] = "80"  # what --help is laid out for
DATE = b"Sun, 06 Nov 1994 08:49:37 GMT"
MAIL = "https://mail.example.com"


@pytest.fixture(autouse=True)
def nothing_hangs():
    """A test that hangs says where, and ends the run."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def run(*argv):
    """owahttps.py with these arguments, in this process: (exit code, standard output, standard error)."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        try:
            code = owahttps.main(list(argv))
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def serving(*argv, **settings):
    """`owahttps.py serve` as a process of its own, on a free loopback port: (process, port)."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "serve", "--bind", "127.0.0.1", "--port", "0"] + list(argv),
        **dict(dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE), **settings),
    )
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


# ---- The rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "authority, name",
    [
        ("mail.example.com", "mail.example.com"),
        ("MAIL.Example.com:8080", "mail.example.com"),
        ("a", "a"),
        ("a.", "a"),
        ("a.:80", "a"),
        ("a:", "a"),
        ("[::1]:", "[::1]"),
        ("a_b-c.d", "a_b-c.d"),
        ("1a.2b", "1a.2b"),
        ("192.0.2.1:80", "192.0.2.1"),
        ("[::1]", "[::1]"),
        ("[2001:DB8::1]:65535", "[2001:db8::1]"),
        ("[::ffff:192.0.2.1]", "[::ffff:192.0.2.1]"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("a" * 63 + ".b", "a" * 63 + ".b"),
        ("a." * 126 + "a", "a." * 126 + "a"),
        ("0x.example", "0x.example"),
        ("1.2.3.4.example:1", "1.2.3.4.example"),
    ],
)
def test_server_name(authority, name):
    assert server_name(authority) == name


@pytest.mark.parametrize(
    "authority",
    [
        "",
        ".",
        "..",
        "a..",
        "a..b",
        ".a",
        "-a",
        "a-",
        "_a",
        ":",
        ":80",
        "a::",
        "a:0",
        "a:65536",
        "a:123456",
        "a:b",
        "a:80:80",
        "a b",
        "a\t",
        "a\n",
        "\na",
        "a@b",
        "u:p@a",
        "a#b",
        "a?b",
        "a/b",
        "a\\b",
        "a,b",
        "a%b",
        "a%20b",
        '"a"',
        "'a'",
        "<a>",
        "a;b",
        "a|b",
        "{a}",
        "$a",
        "*",
        "*.a",
        "\xe9",
        "b\xfccher.example",
        "\u212a",
        "\u0661.example",
        "a\0",
        "a\x7f",
        "::1",
        "[::1",
        "::1]",
        "[::1]a",
        "[::1].",
        "[]",
        "[a]",
        "[::g]",
        "[1::2::3]",
        "[fe80::1%eth0]",
        "[fe80::1%25eth0]",
        "[::ffff:01.2.3.4]",
        "[::1.2.3.04]",
        "[::ffff:1.2.3.256]",
        "0x7f.1",
        "[v1.a]",
        "256",
        "1.2.3",
        "1.2.3.4.5",
        "256.1.1.1",
        "01.2.3.4",
        "1.2.3.0x4",
        "a.0x",
        "127.1",
        "a" * 64,
        "a." * 127 + "a",
    ],
)
def test_server_name_refuses(authority):
    with pytest.raises(HostError) as caught:
        server_name(authority)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "fields, says",
    [
        (dict(path="exchange"), "path 'exchange'"),
        (dict(path=""), "path ''"),
        (dict(path="/a b"), "path '/a b'"),
        (dict(path='/"'), "path"),
        (dict(path="/%20"), "path"),
        (dict(path="/a?b"), "path"),
        (dict(path="/a\n"), "path"),
        (dict(path="/\xe9"), "path '/\\xe9'"),
        (dict(host="a b"), "'a b'"),
        (dict(host="https://a"), "'https://a'"),
        (dict(host="a:443"), "port"),
        (dict(host="[::1]:443"), "port"),
        (dict(allow_hosts=("a", "b:80")), "'b:80'"),
        (dict(allow_hosts=("a@b",)), "'a@b'"),
        (dict(allow_hosts=("",)), "''"),
        (dict(status=303), "303"),
        (dict(status=200), "200"),
        (dict(https_port=0), "0"),
        (dict(https_port=65536), "65536"),
        (dict(health="health"), "'health'"),
    ],
)
def test_a_rule_that_cannot_be(fields, says):
    with pytest.raises(RuleError):
        RedirectRule()._replace(**fields)
    with pytest.raises(RuleError) as caught:
        RedirectRule(**fields)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields, name, target, location",
    [
        ({}, "a", "/x?y", "https://a/exchange"),
        (dict(path="/owa"), "[::1]", "/", "https://[::1]/owa"),
        (dict(host="B.example."), "a", "/", "https://b.example/exchange"),
        (dict(https_port=8443), "a", "/", "https://a:8443/exchange"),
        (dict(https_port=8443, host="[::1]"), "a", "/", "https://[::1]:8443/exchange"),
        (dict(keep_path=True), "a", "/x?y&z=/", "https://a/x?y&z=/"),
        (dict(keep_path=True), "a", "//b/x", "https://a//b/x"),
        (dict(keep_path=True), "a", "/%0d%0a%2f%C3%A9/../?", "https://a/%0d%0a%2f%C3%A9/../?"),
        (dict(keep_path=True), "a", "/%zz%", "https://a/%25zz%25"),
        (
            dict(keep_path=True),
            "a",
            '/\\"<>^`{|}[]\xe9',
            "https://a/%5C%22%3C%3E%5E%60%7B%7C%7D%5B%5D%E9",
        ),
        ({}, "a", "/.well-known/acme-challenge/t", "https://a/.well-known/acme-challenge/t"),
        ({}, "a", "/.well-known/x", "https://a/exchange"),
        (dict(health="/a"), "n", "/", "https://n/exchange"),
        (dict(https_port=1), "n", "/", "https://n:1/exchange"),
        (dict(https_port=442), "n", "/", "https://n:442/exchange"),
        (dict(https_port=65535), "n", "/", "https://n:65535/exchange"),
    ],
)
def test_location(fields, name, target, location):
    assert RedirectRule(**fields).location(name, target) == location


def test_a_rule_made_again_is_the_same():
    rule = RedirectRule(host="A.example", allow_hosts=("b.example", "b.example."), status=301)
    assert (
        rule.allow_hosts == ("a.example", "b.example")
        and RedirectRule(*rule) == rule._replace(status=301) == rule
    )


def test_doctests():
    import doctest

    assert doctest.testmod(owahttps).attempted >= 2 and doctest.testmod(owahttps).failed == 0


def test_random_heads_never_break_a_location():
    """Whatever bytes come, a Location names the host that was asked for, in a URL that Python and the grammar read."""
    rnd = random.Random(279681)
    pieces = [
        "GET",
        "POST",
        " ",
        " ",
        "/",
        "/x",
        "//",
        "http://",
        "a",
        "good.example",
        "evil",
        "@",
        "#",
        "?",
        "\\",
        ":",
        ":80",
        "[::1]",
        "%0d%0a",
        "%",
        "\r\n",
        "\r\n",
        "\r",
        "\n",
        "\t",
        "\0",
        "\x7f",
        "\xe9",
        ".",
        "..",
        " HTTP/1.1\r\nHost: ",
        " HTTP/1.0\r\n",
        "\r\nHost: ",
        "X: y\r\n",
        ",",
        '"',
        "<",
    ]
    redirected = 0
    for _ in range(20000):
        if rnd.random() < 0.5:
            text = "GET /%s HTTP/1.1\r\nHost: good.example%s\r\n\r\n" % tuple(
                "".join(rnd.choice(pieces) for _ in range(rnd.randrange(4))) for _ in range(2)
            )
        else:
            text = "".join(rnd.choice(pieces) for _ in range(rnd.randrange(1, 16))) + "\r\n\r\n"
        head = text.encode("latin-1")
        head = head[: head.index(b"\r\n\r\n") + 4]
        for rule in (RedirectRule(), RedirectRule(keep_path=True)):
            result = owahttps.answer(head, rule)
            match = re.search(
                rb"\r\nLocation: ([^\r]*)\r\n", result.rest.partition(b"\r\n\r\n")[0] + b"\r\n"
            )
            if not match:
                assert result.refusal or result.start.startswith((b"HTTP/1.1 204", b"HTTP/1.1 200"))
                continue
            redirected += 1
            url = urlsplit(match.group(1).decode())
            asked = re.search(rb"(?i)^[^ ]+ https?://([^/?#]*)", head.lstrip()) or re.search(
                rb"(?i)\r\nhost:[ \t]*([^\r\t ]*)", head
            )
            assert url.scheme == "https" and "@" not in url.netloc
            assert url.netloc == server_name(asked.group(1).decode("latin-1"))
            assert re.fullmatch(
                r"(?:[A-Za-z0-9._~:/?@!$&'()*+,;=\[\]-]|%[0-9A-Fa-f]{2})+", match.group(1).decode()
            )
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
    rules = (
        RedirectRule(),
        RedirectRule(host="mail.example.com", https_port=8443, status=308, path="/owa"),
        RedirectRule(
            keep_path=True,
            allow_hosts=("mail.example.com",),
            health="/health",
            acme_dir=token_folder,
        ),
    )
    for rule in rules:
        stock = StockServer(("127.0.0.1", 0), RedirectHandler)
        stock.rule = rule
        with (
            running(stock) as (_, stock_port),
            running(RedirectServer(("127.0.0.1", 0), rule=rule)) as (_, port),
        ):
            for what, needs, expect, request in CASES:
                ours = owahttps._conversation(("127.0.0.1", port), request, 3)
                assert ours == owahttps._conversation(("127.0.0.1", stock_port), request, 3), what
                if owahttps._applies(needs, rule):
                    assert owahttps._answers(ours, request) in owahttps._expected(
                        expect, rule
                    ).split("|"), what
                if ours:
                    assert ours.count(b"\r\nDate: " + DATE + b"\r\n") == ours.count(b"HTTP/1.1 ")
                    assert (
                        b"\r\nServer: owahttps\r\n" in ours and b"\r\nConnection: close\r\n" in ours
                    )


def test_the_answer_to_the_byte():
    result = owahttps.answer(
        b"GET / HTTP/1.1\r\nHost: a&b.example\r\n\r\n".replace(b"&", b"-"), RedirectRule()
    )
    body = (
        b"<!DOCTYPE html>\n<title>Object moved</title>\n<h1>Object moved</h1>\n"
        b'<p>This object may be found <a href="https://a-b.example/exchange">here</a>.\n'
    )
    assert result.start + DATE + result.rest == (
        b"HTTP/1.1 302 Found\r\nDate: "
        + DATE
        + b"\r\nServer: owahttps\r\nLocation: https://a-b.example/exchange\r\n"
        b"Content-Type: text/html; charset=utf-8\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    assert not result.close and result.log == '"GET / HTTP/1.1" 302 %d "-" "-"' % len(body)


@pytest.mark.parametrize(
    "head, status, has",
    [
        ("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", 302, b"Content-Length: 1"),
        (
            "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
            204,
            b"Server: owahttps\r\nAllow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS\r\n\r\n",
        ),
        ("TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", 405, b"Allow: GET, HEAD"),
        ("GET / HTTP/1.0\r\nHost: a\r\n\r\n", 302, b"Connection: close"),
        ("GET / HTTP/1.2\r\nHost: a\r\n\r\n", 302, b"Location: https://a/"),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-Proto: HTTPS, http\r\n\r\n",
            421,
            b"redirect loop",
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-Proto: http, https\r\n\r\n",
            302,
            b"Location: https://a/",
        ),
        ("GET / HTTP/1.1\r\nhOST:a \t\r\n\r\n", 302, b"https://a/"),
        ("GET / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\n", 400, b"Content-Length"),
        ("GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n\r\n", 400, b"Content-Length"),
        ("GET http://a?b HTTP/1.1\r\nHost: x\r\n\r\n", 302, b"https://a/?b\r\n"),
        ("GET HTTPS://A:1/ HTTP/1.1\r\nHost: x\r\n\r\n", 302, b"https://a/\r\n"),
        ("GET http:///x HTTP/1.1\r\nHost: x\r\n\r\n", 400, b"not one server name"),
        ("GET http://a/ HTTP/1.1\r\nHost: \r\n\r\n", 400, b"not one server name"),
        ("GET /\xe9 HTTP/1.1\r\nHost: a\r\n\r\n", 302, b"https://a/%E9\r\n"),
        ("GET /'&<a HTTP/1.1\r\nHost: a\r\n\r\n", 302, b'&#x27;&amp;%3Ca"'),
        ("G@T / HTTP/1.1\r\nHost: a\r\n\r\n", 400, b"malformed request line"),
        ("GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400, b"malformed request line"),
        ("HEAD / HTTP/1.1\r\nHost: a\r\nbad\r\n\r\n", 400, b"Content-Length: 9"),
        ("\r\nHEAD / HTTP/2.0\r\n\r\n", 505, b"Content-Length: 1"),
        ("M" * 50 + " / HTTP/1.1\r\nHost: a\r\n\r\n", 302, b"https://a/"),
        ("M" * 51 + " / HTTP/1.1\r\nHost: a\r\n\r\n", 400, b"malformed request line"),
        ("GET / http/1.1\r\nHost: a\r\n\r\n", 400, b"malformed request line"),
        ("\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"[:4], 400, b"malformed request line"),
    ],
)
def test_answers(head, status, has):
    result = owahttps.answer(head.encode("latin-1"), RedirectRule(keep_path=True))
    assert result.start.startswith(b"HTTP/1.1 %d " % status) and has in result.rest
    assert result.rest.endswith(b"\r\n\r\n") == (head.lstrip()[:4] in ("HEAD", "OPTI"))


# What sorts before or after a word that decides must not be taken for it; a limit holds to the byte.
@pytest.mark.parametrize(
    "line, fields, status",
    [
        ("GET /a", "", 302),
        ("GET /health", "", 200),
        ("GET /i", "", 302),
        ("GET /healthy", "", 302),
        ("POST /health", "", 302),
        ("OPTIONS /health", "", 200),
        ("OPTIONS !", "", 400),
        ("OPTIONS evil", "", 400),
        ("PUT *", "", 400),
        ("GET *", "", 400),
        ("OPTIONS *", "", 204),
        ("GET /", "X-Forwarded-Proto: http", 302),
        ("GET /", "X-Forwarded-Proto: wss", 302),
        ("GET /", "X-Forwarded-Proto: HTTPS, http", 421),
        ("GET /" + "a" * 8191, "", 302),
        ("GET /" + "a" * 8192, "", 414),
        ("GET /", "X: " + "a" * (32768 - 32), 302),
        ("GET /", "X: " + "a" * (32768 - 31), 431),
    ],
    ids=lambda value: str(value)[:30],
)
def test_near_misses_and_limits(line, fields, status):
    head = "%s HTTP/1.1\r\nHost: a\r\n%s\r\n" % (line, fields and fields + "\r\n")
    result = owahttps.answer(head.encode(), RedirectRule(health="/health"))
    assert result.start[9:12] == b"%d" % status
    assert (
        status == 204
        or b"\r\nContent-Length: %d\r\n" % len(result.rest.partition(b"\r\n\r\n")[2]) in result.rest
    )


def test_fields_in_the_log_have_a_limit():
    result = owahttps.answer(
        b"GET / HTTP/1.1\r\nHost: a\r\nReferer: %s\r\nUser-Agent: %s\r\n\r\n"
        % (b"r" * 1001, b"\xff" * 251),
        RedirectRule(),
    )
    assert result.log.split(" ")[-2:] == ['"%s"' % ("r" * 1000), '"%s"' % ("\\xFF" * 250)]


def test_what_is_plain_text_says_so(token_folder):
    rule = RedirectRule(health="/health", acme_dir=token_folder, https_port=1)
    for target, status in (("/health", b"200"), (owahttps.ACME_PREFIX + "none", b"404")):
        result = owahttps.answer(b"GET %s HTTP/1.1\r\nHost: a\r\n\r\n" % target.encode(), rule)
        assert (
            result.start[9:12] == status
            and b"Content-Type: text/plain; charset=utf-8\r\n" in result.rest
        )
    assert (
        b"Content-Type: text/html"
        in owahttps.answer(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", rule).rest
    )
    assert (
        b"Location: https://a:1/exchange\r\n"
        in owahttps.answer(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", rule).rest
    )


def test_the_fixed_host_is_allowed_too():
    rule = RedirectRule(host="A.example", allow_hosts=("B.example",))
    assert (
        set(rule.allow_hosts) == {"a.example", "b.example"}
        and RedirectRule(host="a").allow_hosts == ()
    )


@pytest.mark.parametrize(
    "status, phrase",
    [
        (301, b"301 Moved Permanently"),
        (302, b"302 Found"),
        (307, b"307 Temporary Redirect"),
        (308, b"308 Permanent Redirect"),
    ],
)
def test_every_status_has_its_phrase(status, phrase):
    result = owahttps.answer(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", RedirectRule(status=status))
    assert (
        result.start == b"HTTP/1.1 " + phrase + b"\r\nDate: "
        and b"Location: https://a/exchange\r\n" in result.rest
    )


@pytest.mark.parametrize(
    "begun, hopeless",
    [
        ("", False),
        ("G", False),
        ("GET / HTTP/1.1", False),
        ("GET / HTTP/1.1\r", False),
        ("GET / HTTP/1.1\r\n", False),
        ("\r\n", False),
        ("\r\nGET", False),
        ("GET / HTTP/1.1\r\nHost: a\r\n", False),
        ("GET /\r\n", True),
        ("GET / HTTP/1.1\n", True),
        ("GET / HTTP/1.1\r\nHost: a\n", True),
        ("\n", True),
        ("\x16", True),
        ("\r\n\r", False),
        ("x" * (owahttps.MAX_TARGET + 67), True),
        ("\r\n" + "x" * (owahttps.MAX_TARGET + 65), True),
        ("GET / HTTP/1.1\r\nX: " + "x" * owahttps.MAX_HEAD, True),
        ("GET / HTTP/2.0\r\n", True),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_is_hopeless(begun, hopeless):
    """A head is refused as soon as it can never be right, however its bytes are cut into packets; else it may go on."""
    data = begun.encode()
    assert owahttps.is_hopeless(data, len(data)) == hopeless
    if hopeless:
        assert owahttps.answer(data, RedirectRule()).refusal


@pytest.mark.parametrize(
    "target, referer, agent, log",
    [
        ('/a"b', 'x" 200 0 "', "\x1b[31m", '"GET /a\\x22b HTTP/1.1" 302 {} "x\\x22 200 0 \\x22" '),
        ("/\xe9\\", "\xff\t", "ok", '"GET /\\xE9\\x5C HTTP/1.1" 302 {} "\\xFF" "ok"'),
    ],
)
def test_log_lines_cannot_be_forged(target, referer, agent, log):
    """No byte of a request may end a quoted part, begin a line, or reach the terminal raw."""
    head = "GET %s HTTP/1.1\r\nHost: a\r\nReferer: %s\r\nUser-Agent: %s\r\n\r\n" % (
        target,
        referer,
        agent,
    )
    result = owahttps.answer(head.encode("latin-1"), RedirectRule())
    assert (
        re.fullmatch(r'"[ !#-\[\]-~\\]*" \d{3} \d+ "[^"]*" "[^"]*"', result.log)
        and result.log.isprintable()
    )
    if not result.refusal:
        assert result.log.startswith(log.format(result.log.split(" ")[4]))


# ---- The listener ----------------------------------------------------------------------------------------------------

COMBINED = (
    r"127\.0\.0\.1 - - \[\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\] "
    r'"GET /x HTTP/1\.1" 302 \d+ "http://r/" "agent"\n'
)


def test_serve_tells_where_and_logs_in_combined_format():
    with serving("--path", "/owa") as (process, port):
        assert b"Location: https://mail.example.com/owa\r\n" in ask(
            port, get("/x", fields="Referer: http://r/\r\nUser-Agent: agent\r\n")
        )
        assert re.fullmatch(COMBINED, process.stdout.readline().decode())
        assert b" 400 " in ask(port, get(host="a@b"))
        assert re.fullmatch(
            r"\[[^]]+\] owahttps: 127\.0\.0\.1 refused: " + owahttps.NO_NAME + "\n",
            next(
                line
                for line in iter(lambda: process.stderr.readline().decode(), "")
                if "warning" not in line
            ),
        )
        process.terminate()
        assert process.wait(5) == 0 or os.name == "nt"  # where it is no signal, but the end


@pytest.mark.parametrize(
    "argv, code, says",
    [
        (["serve", "--port", "70000"], 2, "'70000' is not a number from 0 to 65535"),
        (["serve", "--port", "x"], 2, "'x'"),
        (["serve", "--path", "owa"], 2, "path 'owa'"),
        (["serve", "--host", "a b"], 2, "'a b'"),
        (["serve", "--status", "303"], 2, "303"),
        (["serve", "--acme-dir", "/no/such"], 2, "/no/such"),
        (["serve", "--bind", "203.0.113.9", "--port", "0"], 1, "203.0.113.9"),
        (["serve", "--bind", "no.such.invalid", "--port", "0"], 1, "no.such.invalid"),
        (["serve", "--prot", "80"], 2, "--port"),
        (["sevre"], 2, "serve"),
        (["generate", "--write", "/no/such"], 1, "'/no/such' is not a folder"),
        (["selftest", "--path", "/x"], 2, "--against"),
        (["selftest", "--against", "non sense"], 2, "non sense"),
        (["selftest", "--against", "http://127.0.0.1:1"], 1, "gives no answer"),
        (["serve", "--https-port", "80"], 2, "a loop"),
        (["serve", "--path", "/owa", "--keep-path"], 2, "--keep-path"),
        (["serve", "--health", "x"], 2, "health 'x'"),
        (["demo", "--path", "/a", "--keep-path"], 2, "--keep-path"),
        (["demo", "--key", "k"], 2, "--key"),
        (["demo", "--cert", SCRIPT + "x"], 2, "--cert"),
        (["demo", "--cert", os.path.join(HERE, "README.md")], 2, "PEM"),
        (["serve", "--max-connections", "-1"], 2, "-1"),
        (["serve", "--health", "/exchange"], 2, "health"),
        (["serve", "--health", "/"], 2, "health"),
        (["serve", "--host", ""], 2, "empty"),
        (["serve", "--user="], 2, "empty"),
        (["check", "a/b"], 3, "'a/b'"),
        (
            ["serve", "--user", "no-such-user", "--bind", "127.0.0.1", "--port", "0"],
            1,
            "no-such-user",
        ),
        (["--quiet", "serve"], 2, "does not belong"),
        (["demo", "--host", "a"], 2, "--host"),
        (["check", "--health", "/x", "a"], 3, "--health"),
        (["check"], 3, "TARGET"),
        (["check", "a b"], 3, "'a b'"),
        (["check", "https://a"], 3, "https"),
        (["check", "a", "--ca-file", "/no/such"], 3, "/no/such"),
        (["check", "--tmieout", "3", "a"], 3, "--timeout"),
        (["demo", "--cert", "/no/such"], 2, "/no/such"),
    ],
)
def test_errors_are_one_line(argv, code, says):
    got, out, err = run(*argv)
    assert (got, out) == (code, "") and err.count("\n") == 1 and "Traceback" not in err
    assert any(one in err for one in says.split("|")), err


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or not sys.platform.startswith("linux"),
    reason="privileged ports are Linux's here",
)
def test_cannot_bind():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        code, _, err = run("serve", "--bind", "127.0.0.1", "--port", str(taken.getsockname()[1]))
    assert code == 1 and "is in use" in err and "ss -ltnp" in err
    assert all(
        way in owahttps._bind_trouble(PermissionError(13, "no"), "", 80)
        for way in ("CAP_NET_BIND", "ip_unprivileged_port_start", "--user")
    )


@pytest.mark.parametrize(
    "fields, host, says",
    [
        ({}, "127.0.0.1", []),
        (dict(status=301), "127.0.0.1", ["301"]),
        (dict(status=308), "::1", ["308"]),
        (dict(status=308), "192.0.2.1", []),
        (dict(https_port=8443), "127.0.0.1", ["Let's Encrypt"]),
        (dict(https_port=8443, acme_dir="/x"), "127.0.0.1", []),
    ],
)
def test_warnings(monkeypatch, fields, host, says):
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    warnings = list(owahttps._warnings(RedirectRule(**fields), host))
    assert len(warnings) == len(says) and all(word in line for word, line in zip(says, warnings))
    monkeypatch.setattr(os, "geteuid", lambda: 0, raising=False)
    assert any("root" in line for line in owahttps._warnings(RedirectRule(), "::"))


@pytest.mark.skipif(
    getattr(os, "geteuid", lambda: 1)() != 0 or not os.path.exists("/proc/self/status"),
    reason="needs root and /proc",
)
def test_user_gives_root_up():
    """After the port is bound nothing of root may be left, neither in user nor in group."""
    with serving("--user", "nobody") as (process, port):
        assert b" 302 " in ask(port, get())
        with open("/proc/%d/status" % process.pid) as file:
            ids = re.findall(r"(?m)^[UG]id:\s+(\d+)\s+(\d+)\s+(\d+)\s+(\d+)", file.read())
        assert len(ids) == 2 and "0" not in ids[0] + ids[1]


def test_every_address_in_one_socket():
    """The default bind answers IPv4 and, where there is any, IPv6; an IPv4 client's address is written as one."""
    lines = []
    log = type("Log", (), {"write": lambda self, line: lines.append(line)})()
    with running(RedirectServer(("", 0), access_log=log)) as (_, port):
        assert b"302 Found" in ask(port, get())
        if socket.has_ipv6:
            with contextlib.suppress(OSError), socket.create_connection(("::1", port), 5) as sock:
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


# ---- The listener under attack and faults ----------------------------------------------------------------------

KEEP = b"GET /%d HTTP/1.1\r\nHost: mail.example.com\r\n\r\n"
ONCE = b"GET /once HTTP/1.1\r\nHost: mail.example.com\r\nConnection: close\r\n\r\n"
linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs Linux: sh, ulimit, signals, /dev/full"
)


class Lines(list):
    """A log that a test can read."""

    write = list.append


class Quick(RedirectHandler):
    head_seconds, idle_seconds, drain_seconds = 0.3, 0.3, 0.2


def wait_until(true, seconds=10.0):
    """Poll until true() is, at most so many seconds; what it gave last."""
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.005)
    return true()


@contextlib.contextmanager
def listening(handler=RedirectHandler, keep_path=True, **options):
    server = RedirectServer(
        ("127.0.0.1", 0),
        handler,
        rule=RedirectRule(keep_path=keep_path),
        access_log=Lines(),
        error_log=Lines(),
        **options,
    )
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True
    )
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


def fetch_all(server, data=ONCE):
    with contextlib.closing(connect(server, data)) as sock:
        return read_all(sock)


def is_whole(answer, status=b"302"):
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"\r\nContent-Length: ([0-9]+)", head)
    return (
        head.startswith(b"HTTP/1.1 " + status)
        and length is not None
        and int(length.group(1)) == len(body)
    )


def statuses(answers):
    return re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", answers)


def abort(sock):
    sock.setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii" if os.name != "nt" else "hh", 1, 0)
    )
    sock.close()


# ---- The listener under attack: clients ------------------------------------------------------------------------------


def test_slow_clients_are_cut_at_their_deadline_and_nobody_waits_for_them():
    """A byte now and then must never prolong the deadline for a head, nor hold up a normal client."""

    class Slow(RedirectHandler):
        head_seconds = 0.6

    with listening(Slow, max_connections=200) as server:
        born, ends = time.monotonic(), {}
        slow = {
            connect(server): bytearray(
                b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 9999 if number % 3 else b""
            )
            for number in range(150)
        }
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
            assert is_whole(fetch_all(server))
            normal.append(time.monotonic() - start)
        assert len(ends) == 150 and min(ends.values()) > 0.5 and max(ends.values()) < 3
        assert sorted(normal)[len(normal) // 2] < 0.1
        assert wait_until(lambda: not server._connections)
        assert sum("no whole request head in time" in line for line in server.error_log) == 100


def test_slow_clients_are_dropped_a_few_at_a_time():
    """A crowd that is overdue at once must never be dropped in one go, while everybody else waits."""

    class Slow(RedirectHandler):
        head_seconds = 0.3

    with listening(Slow, max_connections=300) as server:
        turns, turn = [], server._turn
        server._turn = lambda timeout: (turns.append(len(server._connections)), turn(timeout))
        crowd = [connect(server) for _ in range(250)]
        assert wait_until(lambda: turns and max(turns) >= 200 and not server._connections)
        assert max(before - after for before, after in zip(turns, turns[1:])) <= 64
        for sock in crowd:
            sock.close()


def test_oldest_idle_connection_makes_room():
    """At the cap a new client must never be the one that waits, and no more than one old one may pay for it."""
    with listening(max_connections=20) as server:
        idle = []
        for _ in range(20):
            idle.append(connect(server))
            assert wait_until(lambda: len(server._connections) == len(idle))
        with contextlib.closing(connect(server)) as kept:
            assert wait_until(lambda: select.select(idle[:1], [], [], 0)[0])
            kept.sendall(KEEP % 1)
            assert kept.recv(9999).startswith(b"HTTP/1.1 302")
            assert read_all(idle[0]) == b"" and not select.select(idle[1:], [], [], 0)[0]
            assert is_whole(fetch_all(server)) and len(server._connections) <= 20
        for sock in idle:
            sock.close()


def test_a_request_under_way_makes_no_room():
    """At the cap, who is being answered must never pay for one who is silent, nor for having begun early."""
    with listening(max_connections=2) as server:
        busy, idle = connect(server, KEEP % 1), connect(server, KEEP % 2)
        assert busy.recv(9999) and idle.recv(9999)
        busy.sendall(KEEP % 3 + b"GET")
        assert busy.recv(9999).startswith(b"HTTP/1.1 302")
        with contextlib.closing(connect(server)):
            assert read_all(idle) == b""
            busy.sendall((KEEP % 4)[3:])
            assert busy.recv(9999).startswith(b"HTTP/1.1 302")
        newcomers, serve = [], server._serve
        assert wait_until(lambda: len(server._connections) == 1)

        def together(handlers):
            if handlers and not newcomers:  # a request and newcomers in one turn
                newcomers.extend(connect(server) for _ in range(3))
            serve(handlers)

        server._serve = together
        busy.sendall(KEEP % 5)
        assert busy.recv(9999).startswith(b"HTTP/1.1 302") and newcomers
        for sock in [busy, idle] + newcomers:
            sock.close()


@pytest.mark.parametrize("count", (0, 1, 31, 32, 33, 64))
def test_a_lone_lf_after_pipelined_requests(count):
    """Whatever its place in the pipeline, a malformed head must never wait for its deadline."""
    with (
        listening() as server,
        contextlib.closing(
            connect(server, KEEP % 1 * count + b"GET / HTTP/1.1\r\nHost: x\n\n")
        ) as sock,
    ):
        start = time.monotonic()
        assert (
            statuses(read_all(sock)) == [b"302"] * count + [b"400"] and time.monotonic() - start < 3
        )


def test_a_log_that_raises_is_told():
    """An access log of the caller's own that fails must cost that connection and one line, never the server."""

    class Failing:
        def write(self, line):
            raise OSError(28, "No space left on device")

    with listening() as server:
        server.access_log, kept = Failing(), server.access_log
        assert fetch_all(server) == b""
        server.access_log = kept
        assert (
            is_whole(fetch_all(server))
            and len(server.error_log) == 1
            and "No space left" in server.error_log[0]
        )
        server.error_log = Failing()
        assert fetch_all(server, b"BAD\r\n\r\n") == b""
        server.error_log = None
        assert is_whole(fetch_all(server))


@pytest.mark.parametrize(
    "wanted, soft, hard, cap",
    [
        (0, 1024, 20000, 16384),
        (2000, 100, 20000, 2000),
        (2000, 100, 1024, 960),
        (0, 64, 64, 8),
        (5, 1024, 1024, 5),
        (0, -1, -1, 16384),
    ],
)
def test_connection_cap(wanted, soft, hard, cap, monkeypatch):
    resource = pytest.importorskip("resource")
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    assert owahttps._connection_cap(wanted) == cap and limits[-1][0] == hard


@pytest.mark.parametrize("idle", (0, 3))
def test_out_of_file_descriptors(idle):
    """A server that can accept nothing must never spin nor die; the connection that has waited longest makes room."""
    with listening() as server:
        waiting = [connect(server) for _ in range(idle)]
        assert wait_until(lambda: len(server._connections) == idle)
        calls, real = [], server.get_request

        def get_request():
            calls.append(time.monotonic())
            if len(server._connections) == idle and (idle or len(calls) == 1):
                raise OSError(errno.EMFILE, "Too many open files")
            return real()

        server.get_request = get_request
        assert is_whole(fetch_all(server))
        assert len(calls) < 10 and len(server._connections) <= max(0, idle - 1)
        for sock in waiting:
            sock.close()


@pytest.mark.parametrize("number", (errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
def test_out_of_the_systems_resources(number):
    """Where to give up a connection would not help, those that are open must be served on."""
    with listening() as server:
        kept = [connect(server, KEEP % 1) for _ in range(5)]
        assert all(sock.recv(9999).startswith(b"HTTP/1.1 302") for sock in kept)
        failing, real = threading.Event(), server.get_request

        def get_request():
            if not failing.is_set():
                raise OSError(number, os.strerror(number))
            return real()

        server.get_request = get_request
        with contextlib.closing(connect(server, ONCE)) as waiting:
            for sock in kept:
                sock.sendall(KEEP % 2)
                assert sock.recv(9999).startswith(b"HTTP/1.1 302")
                sock.close()
            failing.set()
            assert is_whole(read_all(waiting))


def test_a_connection_is_closed_once():
    """At the cap one makes room for another, whichever turn both are in: close_request() is told once of each."""
    closed = []
    with listening(max_connections=1) as server:
        close = server.close_request
        server.close_request = lambda request: (closed.append(request), close(request))
        socks = [connect(server, KEEP % 1) for _ in range(20)]
        assert wait_until(lambda: len(closed) >= 19)
        for sock in socks:
            sock.close()
        assert (
            wait_until(lambda: not server._connections)
            and len(closed) == len(set(map(id, closed))) == 20
        )


@pytest.mark.parametrize("count", (1, 31, 32, 33, 64, 100))
def test_pipelined_requests_are_answered_in_order(count):
    """No pipelined request may be lost, doubled or overtaken, wherever the server takes its breath."""
    with listening() as server:
        answers = fetch_all(server, b"".join(KEEP % number for number in range(count)) + ONCE)
        assert re.findall(rb"\r\nLocation: https://mail.example.com/(.*)\r\n", answers) == [
            b"%d" % number for number in range(count)
        ] + [b"once"]
        assert len(server.access_log) == count + 1


@pytest.mark.parametrize("before", (0, 30, 31, 32))
def test_a_body_after_pipelined_requests(before):
    """Whatever its place in the pipeline, a request with a body must never have its answer torn by a reset."""
    with (
        listening() as server,
        contextlib.closing(
            connect(
                server,
                KEEP % 1 * before
                + b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n",
            )
        ) as sock,
    ):
        select.select([sock], [], [], 5)
        with contextlib.suppress(OSError):
            for _ in range(10):
                sock.sendall(b"x" * 100000)
                time.sleep(0.002)
        assert statuses(read_all(sock)) == [b"302"] * (before + 1)


@pytest.mark.parametrize(
    "start, status",
    [
        (b"", b"414"),
        (b"GET /", b"414"),
        (b"\r\n", b"414"),
        (b"GET / HTTP/1.1\r\nHost: ", b"431"),
        (b"GET / HTTP/1.1\r\nX: ", b"431"),
    ],
)
def test_a_million_bytes_without_a_line_end(start, status):
    """The server must never keep more than a head's worth of them, and the client must see why, not a reset."""
    kept = []

    class Watched(RedirectHandler):
        def receive(self):
            super().receive()
            kept.append(len(self.buffer))

    with listening(Watched) as server:
        with contextlib.closing(connect(server)) as sock:
            sender = threading.Thread(
                target=lambda: (sock.sendall(start + b"a" * 1000000), sock.shutdown(socket.SHUT_WR))
            )
            sender.start()
            answer = read_all(sock)
            sender.join(10)
        assert is_whole(answer, status) and max(kept) <= owahttps.MAX_HEAD + 8192


@pytest.mark.parametrize("after", (2, 999, 1 << 20))
def test_a_last_request_that_fills_the_receive_buffer(after):
    """What the client sends on behind it must never reset the answer, though none of it was seen yet."""
    head = (
        ONCE[:-2] + b"X: " + b"x" * (RedirectHandler.receive_at_once - len(ONCE) - 5) + b"\r\n\r\n"
    )
    assert len(head) == RedirectHandler.receive_at_once
    with listening() as server:
        for _ in range(3):
            assert is_whole(fetch_all(server, head + b"x" * after))


def test_a_body_has_an_end():
    """A client that sends for ever must be cut off, however fast it is."""

    class Short(RedirectHandler):
        drain_at_most = 400000

    with (
        listening(Short) as server,
        contextlib.closing(
            connect(server, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999\r\n\r\n")
        ) as sock,
    ):
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 1 << 26:
                sent += sock.send(b"x" * 65536)
        assert sent < 1 << 26 and wait_until(lambda: not server._connections)


def test_pipelined_answers_do_not_wait_for_the_clients_acknowledgement():
    """Nagle's algorithm against delayed acknowledgement: 40 ms for each batch of answers after the second."""
    with listening() as server, contextlib.closing(connect(server)) as sock:
        for _ in range(20):
            pipelined(sock, 1)  # an acknowledgement is delayed once a conversation has begun
        assert min(pipelined(sock, 100) for _ in range(5)) < 0.03


def pipelined(sock, count):
    """Seconds until so many pipelined requests are answered."""
    start, data = time.monotonic(), b""
    sock.sendall(KEEP % 1 * count)
    while len(statuses(data)) < count:
        data += sock.recv(65536)
    return time.monotonic() - start


def test_unfinished_heads_have_a_budget():
    """Heads that are never finished must never take more memory than all together may; the oldest pay."""
    with listening() as server:
        server.max_bytes = 200000
        crowd = [connect(server, b"GET / HTTP/1.1\r\nX: " + b"x" * 30000) for _ in range(40)]
        assert wait_until(lambda: len(select.select(crowd, [], [], 0)[0]) >= 34)
        assert not server.error_log  # nobody is to be banned for it
        assert is_whole(fetch_all(server)) and not select.select(crowd[-1:], [], [], 0)[0]
        assert (
            0
            < server._held
            == sum(len(handler.buffer) for handler in server._connections)
            <= 200000
        )
        for sock in crowd:
            sock.close()
        assert wait_until(lambda: not server._connections) and server._held == 0


def test_a_process_that_was_held_up_drops_nobody():
    """What came while the process was stopped (a laptop's lid, a debugger) must be answered, however late it is."""
    with listening(Quick) as server, contextlib.closing(connect(server, KEEP % 1)) as sock:
        assert sock.recv(9999).startswith(b"HTTP/1.1 302")
        select_, held_up = server._selector.select, threading.Event()

        def select(timeout):
            if held_up.is_set():
                return select_(timeout)
            held_up.set()
            sock.sendall(ONCE)
            time.sleep(2 * Quick.idle_seconds)  # is interrupted, and sees nothing
            return []

        server._selector.select = select
        assert is_whole(read_all(sock))


def test_rules_that_look_alike_share_no_answers():
    """A rule of the caller's own must never be answered for by another server's equal one."""

    class Portal(RedirectRule):
        def location(self, name, target):
            return "https://portal.example/"

    answers = []
    for rule in (RedirectRule(), Portal()):
        with running(RedirectServer(("127.0.0.1", 0), rule=rule)) as (_, port):
            answers.append(b"portal.example" in ask(port, get()))
    assert answers == [False, True]


@linux
@pytest.mark.parametrize("other", ("link", "fifo"))
def test_a_token_that_is_swapped(other, tmp_path):
    """A token file that becomes a link or a FIFO between two looks must never be followed, nor hold up the server."""
    if other == "link":
        os.symlink("/etc/passwd", str(tmp_path / "token"))
    else:
        os.mkfifo(str(tmp_path / "token"))
    real, regular = os.lstat, os.stat(SCRIPT)
    try:
        os.lstat = lambda path: regular
        assert owahttps.read_token(str(tmp_path), "token") is None
    finally:
        os.lstat = real
    assert owahttps.read_token(str(tmp_path), "token") is None


def test_a_body_that_never_comes():
    """The answer must never wait for a body, nor the connection outlive the drain's deadline."""
    with listening(Quick) as server:
        with contextlib.closing(
            connect(server, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n")
        ) as sock:
            assert is_whole(read_all(sock))
            assert wait_until(lambda: not server._connections, 3)


@pytest.mark.parametrize("framing", ("length", "chunked"))
@pytest.mark.parametrize("size", (1, 8192, 1 << 20))
def test_a_body_never_turns_the_answer_into_a_reset(size, framing):
    """A client that sends its whole body before it reads must get the whole answer, and the body is never a request."""
    body = (KEEP % 666 * (size // 40 + 1))[:size]
    head = b"POST / HTTP/1.1\r\nHost: a\r\n"
    with listening() as server:
        for _ in range(3):
            assert is_whole(
                fetch_all(
                    server,
                    head
                    + (
                        b"Content-Length: %d\r\n\r\n%s" % (size, body)
                        if framing == "length"
                        else b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
                        % (size, body)
                    ),
                )
            )
        assert len(server.access_log) == 3


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
@pytest.mark.parametrize(
    "options", ([], ["-H", "Expect:"], ["-H", "Transfer-Encoding: chunked"], ["-0"])
)
def test_curl_posts_a_megabyte(options, tmp_path):
    """curl must never report a reset, nor be told to go on with the body."""
    (tmp_path / "body").write_bytes(b"x" * (1 << 20))
    with listening() as server:
        done = subprocess.run(
            [
                "curl",
                "-sS",
                "-i",
                "--noproxy",
                "*",
                "--data-binary",
                "@%s" % (tmp_path / "body"),
                "http://127.0.0.1:%d/a" % server.server_port,
            ]
            + options,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=20,
        )
        assert (done.returncode, statuses(done.stdout)) == (0, [b"302"]), done.stderr


def test_a_client_that_never_reads():
    """It must be dropped by its deadline, its answers must never pile up, and no other client may wait for it."""
    piles = []

    class Watched(Quick):
        def reply(self):
            super().reply()
            piles.append(len(self.outgoing))

    with listening(Watched) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with contextlib.closing(socket.socket()) as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            deaf.connect(server.server_address[:2])
            deaf.setblocking(False)
            requests = b"A / HTTP/1.1\r\nHost:a\r\n\r\n" * 40000
            while select.select([], [deaf], [], 0.1)[1]:
                requests = requests[deaf.send(requests) :]
            assert requests  # the server has stopped reading
            start = time.monotonic()
            assert is_whole(fetch_all(server)) and time.monotonic() - start < 0.3
            assert wait_until(lambda: not server._connections, 5)
        assert max(piles) < 32 * 1024


def test_half_close_is_answered():
    """A client that has said all it has to say must never be taken for gone."""
    with listening() as server, contextlib.closing(connect(server, KEEP % 1)) as sock:
        sock.shutdown(socket.SHUT_WR)
        assert is_whole(read_all(sock))


@pytest.mark.parametrize("number", (errno.ENOTCONN, errno.ECONNABORTED, errno.EPROTO))
def test_a_client_that_is_gone_before_it_is_accepted(number):
    """accept() fails for it; that must never cost somebody else's connection, nor a rest."""
    with listening() as server, contextlib.closing(connect(server, KEEP % 1)) as idle:
        assert idle.recv(9999).startswith(b"HTTP/1.1 302")
        get_request, failures = server.get_request, [OSError(number, "gone")] * 20

        def failing():
            if failures:
                raise failures.pop()
            return get_request()

        server.get_request = failing
        assert is_whole(fetch_all(server)) and not failures
        idle.sendall(KEEP % 2)
        assert idle.recv(9999).startswith(b"HTTP/1.1 302")


@pytest.mark.parametrize("end", (socket.socket.close, abort))
def test_clients_that_go_away_leave_nothing_behind(end):
    """A client that closes or resets at any stage must never leave a connection, end the server or be a fault."""
    stages = (
        b"",
        b"G",
        b"GET / HTTP/1.1\r\nHost: a\r\n",
        KEEP % 1,
        KEEP % 1 * 50,
        b"\x16\x03\x01",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999\r\n\r\nx",
        b"a" * 9000,
    )
    with listening() as server:
        for number in range(400):
            end(connect(server, stages[number % len(stages)]))
        assert is_whole(fetch_all(server)) and wait_until(lambda: not server._connections)
        assert not [line for line in server.error_log if "refused: " not in line]


@pytest.mark.parametrize(
    "first, answer, reason",
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"", "TLS on the plain HTTP port"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"505", "not HTTP/1"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", b"400", "malformed request line"),
        (b"\x80\x2e\x01\x00\x02", b"", ""),
        (b"EHLO a\r\n", b"400", "malformed request line"),
        (b"\x03\x00\x00\x13\x0e\xe0\r\n\r\n", b"400", "control byte"),
    ],
)
def test_other_protocols(first, answer, reason):
    """What is not HTTP must never hang beyond a head's deadline, and is told in one line why."""
    with listening(Quick) as server:
        assert statuses(fetch_all(server, first))[:1] == ([answer] if answer else [])
        assert len(server.error_log) == 1 and server.error_log[0].endswith(
            "refused: %s\n" % (reason or "no whole request head in time")
        )


@pytest.mark.parametrize(
    "head", (ONCE, b"\r\n" + ONCE, ONCE[:-2] + b"X : y\r\n\r\n", ONCE[:-2] + b"a: \r\n\tb\r\n\r\n")
)
def test_one_byte_a_packet(head):
    """Where the packets end must never change the answer."""
    with listening() as server:
        with contextlib.closing(connect(server)) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for number in range(len(head)):
                sock.send(head[number : number + 1])
            answer = read_all(sock)
        undated = [
            re.sub(rb"Date: [^\r]*", b"", text) for text in (answer, fetch_all(server, head))
        ]
        assert undated[0] == undated[1] and is_whole(answer, answer[9:12])


# ---- Heads -----------------------------------------------------------------------------------------------------------

START = b"GET / HTTP/1.1\r\nHost: mail.example.com\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: evil.example\r\n\r\n"


@pytest.mark.parametrize(
    "fields, expected",
    [
        (b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG", [b"400"]),
        (b"Content-Length: 47\r\n\r\n", [b"302"]),
        (b"Content-Length: 00\r\n\r\n", [b"302", b"302"]),
        (b"Content-Length: 0\r\nContent-Length: 47\r\n\r\n", [b"400"]),
        (b"Content-Length: 0, 0\r\n\r\n", [b"400"]),
        (b"Content-Length: +0\r\n\r\n", [b"400"]),
        (b"Content-Length: -1\r\n\r\n", [b"400"]),
        (b"Content-Length:\r\n\r\n", [b"400"]),
        (b"Content-Length: 0_0\r\n\r\n", [b"400"]),
        (b"Content-Length: \xb2\r\n\r\n", [b"400"]),
        (b"Content-Length: \xa00\r\n\r\n", [b"400"]),
        (b"Content-Length : 47\r\n\r\n", [b"400"]),
        (b"Content-Length: 0\x0b\r\n\r\n", [b"400"]),
        (b"Transfer-Encoding: chunked\r\n\r\n0\r\nHost: evil.example\r\n\r\n", [b"302"]),
        (b"Transfer-Encoding: identity\r\n\r\n", [b"400"]),
        (b"Transfer-Encoding: xchunked\r\n\r\n", [b"400"]),
        (b"Transfer-Encoding: gzip,\tChunked\r\n\r\n", [b"302"]),
        (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", [b"400"]),
        (b"Transfer-Encoding: chunked, gzip\r\n\r\n", [b"400"]),
        (b"Transfer-Encoding: \x85chunked\r\n\r\n", [b"400"]),
        (b"Transfer-Encoding:\r\n chunked\r\n\r\n", [b"400"]),
        (b"Transfer-Encoding : chunked\r\n\r\n", [b"400"]),
        (b"X: x\nTransfer-Encoding: chunked\r\n\r\n", [b"400"]),
        (b"X: x\rTransfer-Encoding: chunked\r\n\r\n", [b"400"]),
        (b"\n", [b"400"]),
        (b"\r\r\n\r\n", [b"400"]),
        (b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n", [b"302", b"302"]),
        (b"Connection: keep-alive, close\r\n\r\n", [b"302"]),
    ],
)
def test_one_request_is_never_two(fields, expected):
    """Where others may see a body, what follows the head must never be answered as a request."""
    with listening() as server:
        assert (
            statuses(
                fetch_all(server, START + fields + SMUGGLED[:-2] + b"Connection: close\r\n\r\n")
            )
            == expected
        )


def fill(unit, end=b"\r\n", start=START):
    return start + unit * ((owahttps.MAX_HEAD - len(start) - len(end)) // len(unit)) + end


@pytest.mark.parametrize(
    "head",
    [
        fill(b"a:\r\n"),
        fill(b"a:\r\n", b"!\r\n\r\n"),
        fill(b"Host:\r\n"),
        fill(b"Host:\r\n", b"\x01\r\n\r\n"),
        fill(b"Referer:\xff\r\n"),
        START + b"Referer: " + b"\xff" * 32000 + b"\r\n\r\n",
        START + b"User-Agent: " + b" \t" * 16000 + b"\x00\r\n\r\n",
        START + b"a" * 32000 + b"\r\n\r\n",
        b"GET /" + b"\xff" * 8191 + b" " + START[6:] + b"\r\n",
        b"GET /" + b"%" * 8191 + b" " + START[6:] + b"\r\n",
        b"GET http://" + b"a." * 4000 + b" " + START[6:] + b"\r\n",
        b"\r" * 32768,
        b"\n" * 32768,
        b"\0" * 32768,
        b"\r\r\n" * 10000,
        START + b"a: " + b"x" * 32000 + b"\x01\r\n\r\n",
        START + b"X-Forwarded-Proto: " + b"," * 32000 + b"\r\n\r\n",
        START[:16] + b"Host: " + b"a." * 16000 + b"!\r\n\r\n",
        START[:16] + b"Host: " + (b"a" * 61 + b"-.") * 500 + b"\r\n\r\n",
        START[:16] + b"Host: [" + b"0:" * 16000 + b"]\r\n\r\n",
        START[:16] + b"Host: " + b"1." * 16000 + b"\r\n\r\n",
        START + b"Content-Length: " + b"9" * 32000 + b"\r\n\r\n",
    ],
    ids=lambda head: repr(head[:24] + b".." + head[-24:]),
)
def test_no_head_takes_long_or_much(head):
    """No 32 KB of input may ever cost more than milliseconds (a regular expression that backtracks takes seconds), fill
    the log with a line of more than some KB, or stay in the cache of answers."""
    rule, seconds = RedirectRule(keep_path=True), []
    for _ in range(3):
        start = time.perf_counter()
        result = owahttps.answer(head, rule)
        owahttps.is_hopeless(head, 1)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1 and len(result.log) < 3 * owahttps.MAX_LOGGED + 50
    with listening(Quick) as server:
        before = server.answer.cache_info().currsize
        assert statuses(fetch_all(server, head + ONCE))
        assert server.answer.cache_info().currsize <= before + 1  # ONCE itself


def test_caches_are_bounded():
    """A thousand names and as many different heads must never all be kept."""
    with listening() as server:
        heads = b"".join(
            b"GET / HTTP/1.1\r\nHost: h%d.example.com\r\n\r\n" % number for number in range(1500)
        )
        assert len(statuses(fetch_all(server, heads + ONCE))) == 1501
    assert (
        owahttps.server_name.cache_info().currsize <= 1024
        and server.answer.cache_info().currsize <= 128
    )


@pytest.mark.parametrize(
    "bytes_",
    [
        b'" 200 0 "-" "-"\r\n6.6.6.6 - - [] "GET / HTTP/1.1',
        b"\n[x] owahttps: 6.6.6.6 refused: x\n",
        b"\x1b[31m",
        b'"',
        b"\\",
        b"\xff\x9b\xe2\x80\xa8",
        b"\0",
        b"\r",
        b"\x85",
        b"\t",
    ],
    ids=repr,
)
def test_no_byte_of_the_network_forges_a_log_line(bytes_):
    """Whatever is in a request, one answer is one line of the access log, in printable ASCII, and at most one error."""
    with listening() as server:
        for request in (
            b"GET /a%s HTTP/1.1\r\nHost: h\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: h\r\nReferer: x%sy\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: h\r\nUser-Agent: x%sy\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: h%s\r\n\r\n",
            b"G%s / HTTP/1.1\r\n\r\n",
        ):
            access, errors = len(server.access_log), len(server.error_log)
            with contextlib.closing(connect(server, request % bytes_)) as sock:
                sock.shutdown(socket.SHUT_WR)
                count = len(statuses(read_all(sock)))
            assert len(server.access_log) == access + count and len(server.error_log) <= errors + 1
        for line in server.access_log:
            assert re.match(
                r'127\.0\.0\.1 - - \[[^]]*\] "[ !#-\[\]-~\\]*" [0-9]{3} [0-9]+ "[ !#-~]*" "[ !#-~]*"\n\Z',
                line,
            )
        for line in server.error_log:
            assert re.match(r"\[[^]]*\] owahttps: 127\.0\.0\.1 refused: [ -~]*\n\Z", line)


# ---- Faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ("setup", "handle", "receive", "reply", "send", "address_string"))
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
        with listening(Broken) as server:
            assert b"302" not in fetch_all(server)
            assert is_whole(fetch_all(server)) and wait_until(lambda: not server._connections)
            assert len(server.error_log) == 1
            assert re.match(
                r"\[.*\] owahttps: 127.0.0.1 error: ZeroDivisionError\([ -~]*\n\Z",
                server.error_log[0],
            )
    finally:
        del RedirectServer.broken


@pytest.mark.parametrize("verdict", (False, ZeroDivisionError()))
def test_a_client_that_is_not_verified_is_closed(verdict):
    """verify_request() may say no, or raise, as in socketserver: that must never end the server nor leak the socket."""

    def verify(request, client_address):
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    with listening() as server:
        server.verify_request = verify
        assert b"302" not in fetch_all(server)
        del server.verify_request
        assert is_whole(fetch_all(server)) and len(server.error_log) == isinstance(
            verdict, Exception
        )


def test_a_stop_without_file_descriptors_does_not_wait():
    with listening() as server:

        def get_request():
            raise OSError(errno.EMFILE, "Too many open files")

        server.get_request = get_request
        start = time.monotonic()
        server.shutdown()
        assert time.monotonic() - start < 2


def test_a_handler_that_closes_its_own_socket():
    """A socket that is closed behind the server's back must never end the server."""

    class Closing(RedirectHandler):
        def send(self):
            super().send()
            if b"away" in self.buffer:
                self.request.close()
                self.waits_for = selectors.EVENT_WRITE

    with listening(Closing) as server:
        with contextlib.closing(connect(server, KEEP % 1)) as sock:
            assert sock.recv(9999).startswith(b"HTTP/1.1 302")
            sock.sendall(b"GET /away HTTP/1.1\r\n")
            read_all(sock)
        assert is_whole(fetch_all(server)) and wait_until(lambda: not server._connections)


@pytest.mark.parametrize("jump", (-1e9, 1e9))
def test_a_clock_that_jumps_changes_no_deadline(jump, monkeypatch):
    """A step of the wall clock must never cut a connection that is not overdue, nor keep one that is."""

    class Half(RedirectHandler):
        head_seconds, idle_seconds = 0.3, 60.0

    with listening(Half) as server:
        with (
            contextlib.closing(connect(server, KEEP % 1)) as idle,
            contextlib.closing(connect(server, b"GET")) as slow,
        ):
            assert idle.recv(9999).startswith(b"HTTP/1.1 302")
            start, now = time.monotonic(), time.time()
            monkeypatch.setattr(time, "time", lambda: now + jump)
            assert is_whole(fetch_all(server))
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
    drain = threading.Thread(
        target=lambda: chunks.extend(iter(lambda: os.read(reader, 65536), b""))
    )
    drain.start()
    assert wait_until(lambda: told and not log.lines)
    log.write("last\n")
    log.close()
    os.close(writer)
    drain.join(10)
    os.close(reader)
    lines = b"".join(chunks).decode().split("\n")
    assert lines[-2:] == ["last", ""] and all(
        re.match("line [0-9]+ x{40}$", line) for line in lines[:-2]
    )
    assert (
        len(lines)
        - 1
        + sum(int(re.match("([0-9]+) lines of the log were lost", text).group(1)) for text in told)
        == 40001
    )


def test_a_line_at_the_wrong_moment_never_puts_the_log_to_sleep():
    """The log's thread may empty the queue between any two steps of write(): the next line must wake it even so."""

    class Lines(deque):
        def append(self, line):
            if self:
                wait_until(lambda: not self)
            super().append(line)

    reader, writer = os.pipe()
    log = owahttps.Log(writer, print)
    log.lines = Lines()
    for line in ("one\n", "two\n"):
        log.write(line)
    assert wait_until(lambda: not log.lines)
    log.close()
    assert os.read(reader, 999) == b"one\ntwo\n"
    os.close(reader)
    os.close(writer)


def test_a_log_reader_that_stalls_to_the_end():
    """close() must never wait for it, and what was under way counts as lost."""
    reader, writer, told, log = pipe_of_log()
    for _ in range(4000):
        log.write("x" * 99 + "\n")
    assert wait_until(lambda: len(log.lines) < 4000)
    start = time.monotonic()
    log.close()
    assert time.monotonic() - start < 3
    lost = int(re.match("([0-9]+) lines of the log were lost", told[-1]).group(1))
    assert 4000 - 700 < lost <= 4000  # a pipe holds 64 KB, at the most
    os.close(reader)  # lets the log's thread go
    assert wait_until(lambda: not log._thread.is_alive())
    os.close(writer)


@linux
def test_a_log_that_recovers_glues_no_lines():
    """A write that was cut short must never make one line of two."""
    reader, writer, told, log = pipe_of_log()
    os.set_blocking(writer, False)
    for _ in range(3000):
        log.write("x" * 99 + "\n")
    assert wait_until(lambda: told)
    read = os.read(reader, 1 << 20)
    log.write("after\n")
    assert wait_until(lambda: len(told) > 1)
    log.close()
    os.close(writer)
    read += os.read(reader, 1 << 20)
    os.close(reader)
    assert read.endswith(b"\nafter\n")
    assert (
        told[0].endswith("Resource temporarily unavailable")
        and "lines of the log were lost" in told[1]
    )


@contextlib.contextmanager
def command(redirection="", *options, **popen):
    """serve as a process of its own, its shell's redirections or limits in front; (process, address)."""
    port = free_port()
    process = subprocess.Popen(
        [
            "sh",
            "-c",
            redirection + ' exec "$@"',
            "sh",
            sys.executable,
            SCRIPT,
            "serve",
            "--bind",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        + list(options),
        **popen,
    )

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
@pytest.mark.parametrize(
    "redirection, told",
    [
        ("exec >&-;", ["standard output is closed"]),
        ("exec <&- >&-;", ["standard output is closed"]),
        (
            "exec >/dev/full;",
            ["log cannot be written, redirects go on", "20 lines of the log were lost"],
        ),
    ],
)
def test_standard_output_that_cannot_be_written(redirection, told):
    """No redirect may be lost with the log; each fault is one line on standard error, and never a traceback."""
    with command(redirection, stderr=subprocess.PIPE) as (process, server):
        assert all(is_whole(fetch_all(server)) for _ in range(20))
        err = end(process)
        assert all(err.count(text) == 1 for text in told) and "Traceback" not in err, err


@linux
def test_standard_output_whose_reader_exits():
    """A pipe that breaks must never end the server."""
    with command(stdout=subprocess.PIPE, stderr=subprocess.PIPE) as (process, server):
        assert (
            is_whole(fetch_all(server)) and b'"GET /once HTTP/1.1" 302' in process.stdout.readline()
        )
        process.stdout.close()
        process.stdout = None
        assert all(is_whole(fetch_all(server)) for _ in range(20))
        assert "Broken pipe" in end(process)


@linux
def test_standard_error_closed():
    """What would be told there must never go into the access log instead."""
    with command("exec 2>&-;", stdout=subprocess.PIPE) as (process, server):
        assert (
            is_whole(fetch_all(server))
            and fetch_all(server, b"\x16") == b""
            and is_whole(fetch_all(server, b"x\r\n\r\n"), b"400")
        )
        process.send_signal(signal.SIGTERM)
        out = process.communicate(timeout=10)[0]
        assert process.returncode == 0 and re.match(
            rb'(127\.0\.0\.1 - - \[[^]]*\] "[^"]*" (302|400) .*\n){2}\Z', out
        ), out


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
        assert all(is_whole(fetch_all(server, b"x\r\n\r\n"), b"400") for _ in range(20))
        end(process)
    if not reader_exits:
        os.close(reader)


@linux
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_sixty_four_file_descriptors():
    """Swamped beyond its descriptors, the server must never leave a normal client unanswered."""
    for options in ((), ("--max-connections", "5000")):
        with command(
            "ulimit -n 64;", *options, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as (process, server):
            crowd = [connect(server) for _ in range(200)]
            assert all(is_whole(fetch_all(server)) for _ in range(5))
            with open("/proc/%d/stat" % process.pid) as stat:
                ticks = sum(map(int, stat.read().rpartition(")")[2].split()[11:13]))
            assert ticks < 3 * os.sysconf("SC_CLK_TCK")
            for sock in crowd:
                sock.close()
            end(process)


@linux
@pytest.mark.parametrize("by", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_under_load_tears_no_answer(by):
    """Requests under way must get whole answers; the last one on a kept connection says so; the exit does not wait."""
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
        halves = [
            connect(server, (KEEP % 2)[: number * 5]) for number in range(1, 8)
        ]  # requests under way
        assert wait_until(lambda: len(answers) > 500)
        process.send_signal(by)
        wait_until(lambda: not any(client.is_alive() for client in clients), 0.1)
        for number, half in enumerate(halves):
            half.sendall((KEEP % 2)[(number + 1) * 5 :])
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
    """A stalled log, a stalled standard error and a client amid a head must never keep the server from ending."""
    readers = [os.pipe(), os.pipe()]
    with command(stdout=readers[0][1], stderr=readers[1][1]) as (process, server):
        with contextlib.closing(
            connect(server, b"".join(KEEP % number for number in range(2000)) + b"x\r\n\r\n")
        ) as sock:
            assert statuses(read_all(sock))[-1:] == [b"400"]
        with contextlib.closing(connect(server, b"GET / HT")), contextlib.closing(connect(server)):
            end(process)
    for pair in readers:
        for fd in pair:
            os.close(fd)


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
HOST = "--host mail.example.com"
IIS = "iis --host app.example.com --allow-host www.app.example.com"
# What the steps must have to the letter, in this order.
LABELS = [
    *("Owahttps.asp", "Inetpub\\Wwwroot\\Owaasp", "SERVER_PORT and SERVER_NAME"),
    *("Internet Service Manager", "Default Web Site", "Exchange folder", "Properties"),
    *("Custom Errors", "403.4", "Message Type", "URL", "/owaasp/owahttps.asp"),
    *("Directory Security", "Secure Communications", "Edit", "Require secure channel (SSL)"),
    *("Require 128-bit encryption", "net stop iisadmin /y"),
    "http://HOST/exchange must land on https://SERVER_NAME/exchange",
]


def generate(words):
    """Return what `owahttps.py generate` prints, which must be ASCII."""
    code, out, err = run("generate", *words.split())
    assert (code, err) == (0, "")
    out.encode("ascii")
    return out


def test_the_articles_page_to_the_letter():
    assert generate("--part asp") == ARTICLE


def test_the_articles_steps():
    steps = generate("--part steps")
    numbers = re.findall(r"(?m)^ ?(\d+)\. ", steps)
    assert numbers == [str(number) for number in range(1, 19)]
    place = 0
    for label in LABELS:
        place = steps.index(label, place) + len(label)


@pytest.mark.parametrize(
    "words, has, has_not, most_lines",
    [
        ("", ["Q319878", "check HOST\n"], ["403.18", "ActiveSync", "Forms-based", "IIS 6"], 60),
        (
            "--port 8080",
            ['"SERVER_PORT")=8080', "check HOST:8080\n"],
            ["=80 ", "any port but 80 "],
            60,
        ),
        (HOST, ['& "mail.example.com"', "check mail.example.com\n"], ["SERVER_NAME"], 60),
        ("--https-port 8443 --path /owa", [':8443/owa"', "the owa folder"], ["xchange folder"], 60),
        ("exchange2003", ["403.18", "KB 817379", "Forms-based"], ["Exchange 2000"], 65),
        (
            f"exchange {HOST}",
            ["PowerShell", "Microsoft's own", "check mail.example.com --path /owa\n", "UrlPrefix"],
            ["SERVER_NAME", "www."],
            95,
        ),
        (
            IIS,
            [
                "Redirect all requests to exact destination (instead of relative to destination)",
                '/bindings:"http/*:80:app.example.com,http/*:80:www.app.example.com"',
                '-exactDestination:false -destination:"https://app.example.com" ||',
                "check app.example.com www.app.example.com --keep-path --host app.example.com\n",
            ],
            ["Exchange", "autodiscover and", "/owa"],
            80,
        ),
        (
            f"iis {HOST} --path /a --https-port 444",
            ['-destination:"https://mail.example.com:444/a"'],
            [],
            95,
        ),
        (f"exchange {HOST} --keep-path --port 81", [":81:mail"], ["mail.example.com/owa"], 95),
        (
            f"exchange {HOST} --status 301",
            ["-httpResponseStatus:Permanent", "max-age=86400"],
            [],
            95,
        ),
        (f"exchange {HOST} --status 308", ["-httpResponseStatus:PermRedirect", "IIS 10"], [], 95),
        (f"iis --host {'a-' * 30}b.example", [f"Host name: {'a-' * 30}b.example."], [], 95),
    ],
)
def test_recipes_say(words, has, has_not, most_lines):
    out = generate(words)
    assert [text for text in has if text not in out] == []
    assert [text for text in has_not if text in out] == []
    assert out.count("\n") <= most_lines
    assert not re.search(r"(?<!%)\{[a-z_]+\}", out)


@pytest.mark.parametrize("words", [f"exchange {HOST} --status 308", IIS])
def test_the_iis_scripts_can_be_verified_by_reading(words):
    for line in generate(words).splitlines():
        assert not re.search("Default Web Site|Back End", line) or "are left alone" in line
    script, undo = (generate(f"{words} --part {part}") for part in ("script", "undo"))
    for text in script, undo:
        assert text.count("\n") < 25
        assert not re.search(r"(?im)\bfor\b.*\bdo\b|findstr|[^|]\|[^|]", text)
    for line in script.splitlines():
        if line.startswith("%APPCMD%") and "list site owahttps" not in line:
            assert line.endswith(" || goto failed"), line


@pytest.mark.parametrize(
    "words, says",
    [
        ("exchan", "generate --list"),
        ("iis7", "generate --list"),
        ("--part script", "asp, steps, notes, undo, verify"),
        ("--keep-path", "decoded URL"),
        ("--status 301", "302"),
        ("--allow-host a.example", "--host"),
        ("--health /up", "one folder"),
        ("exchange2003 --path /", "one folder"),
        ("exchange", "--host"),
        ("iis --host 192.0.2.7", "192.0.2.7"),
        ("iis --host [::1]", "[::1]"),
        (f"iis {HOST} --health /up", "--health"),
        (f"iis {HOST} --acme-dir /tmp", "--acme-dir"),
        (f"exchange {HOST} --api /api", "--api"),
        ("systemd --port 443", "a loop"),
        ("haproxy --acme-dir /tmp", "serves no files"),
        ("nginx --acme-dir tmp", "absolute"),
        ('nginx --acme-dir /a";', "absolute"),
    ],
)
def test_what_a_recipe_cannot_do_is_refused(words, says):
    code, out, err = run("generate", *words.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


HOSTILE = r"""a"b a%>b %PATH% a&calc a|b a>b a^b a'b a`b a$(b) a;b a!b a{b} <% $host a\b"""


@pytest.mark.parametrize("value", [*HOSTILE.split(), "a\nb", "a b"])
def test_hostile_values_reach_no_recipe(value):
    """What cmd.exe, VBScript or a server could take for more than a value never makes a rule."""
    for fields in (
        {"host": value},
        {"path": f"/{value}"},
        {"health": f"/{value}"},
        {"allow_hosts": (value,)},
        {"api": (f"/{value}",)},
    ):
        with pytest.raises(RuleError):
            RedirectRule(**fields)


def test_write(tmp_path):
    """All files or none, never over another one; and what comes next."""
    words = ["generate", "--write", str(tmp_path)]
    for _ in range(2):
        code, out, err = run(*words)
        assert (code, out) == (0, "Owahttps.asp\nowahttps-steps.txt\n")
        assert "next: owahttps-steps.txt" in err
        assert (tmp_path / "Owahttps.asp").read_bytes() == ARTICLE.replace("\n", "\r\n").encode()
    assert b"18. Test:" in (tmp_path / "owahttps-steps.txt").read_bytes()
    (tmp_path / "Owahttps.asp").write_bytes(b"mine")
    (tmp_path / "owahttps-steps.txt").unlink()
    code, out, err = run(*words)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "in place of it" in err
    assert [path.name for path in tmp_path.iterdir()] == ["Owahttps.asp"]
    err = run("generate", "nginx", *words[1:])[2]
    assert "/etc/nginx/conf.d/owahttps.conf, then: nginx -t" in err


def test_a_script_that_is_redirected_has_windows_line_ends():
    command = [sys.executable, SCRIPT, "generate", *IIS.split(), "--part", "script"]
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    assert out.startswith(b"@echo off\r\n") and out.count(b"\n") == out.count(b"\r\n")


def test_the_systemd_unit(tmp_path):
    text = generate("systemd --host mail.example.com --allow-host a.b --keep-path --api /v1")
    assert f"serve --port 80 --keep-path {HOST} --allow-host mail.example.com --allow-host" in text
    assert " --api /v1\n" in text and "\nRestart=always\n" in text
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze here")
    unit = tmp_path / "owahttps.service"
    unit.write_text(text.replace("/usr/bin/python3 -I /usr/local/bin/owahttps.py", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0 and b"owahttps" not in done.stdout, done.stdout


needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl program")


# ---- The check: certificates -----------------------------------------------------------------------------------------

# `check` against real sockets: each case is a site, and what must be found there.  A site is a plain and a TLS server
# on free ports of 127.0.0.1, each with canned bytes for every request; PLAIN and SECURE in them stand for their ports.

OPENSSL_CA = """\
[ca]
default_ca = here
[here]
database = index
serial = serial
new_certs_dir = .
default_md = sha256
policy = any
unique_subject = no
[any]
commonName = supplied
[leaf]
basicConstraints = critical,CA:FALSE
subjectAltName = $ENV::SAN
[client]
basicConstraints = critical,CA:FALSE
subjectAltName = $ENV::SAN
extendedKeyUsage = clientAuth
[authority]
basicConstraints = critical,CA:TRUE
subjectKeyIdentifier = hash
[req]
distinguished_name = name
[name]
"""
OURS, OTHER, DAY = "DNS:localhost,IP:127.0.0.1", "DNS:other.invalid", 86400
# name: (its issuer, alternative names, first and last day from today, extensions)
CERTIFICATES = {
    "authority": ("", OURS, -15000, 999, "authority"),
    "middle": ("authority", OURS, -99, 99, "authority"),
    "other-authority": ("", OURS, -15000, 999, "authority"),
    "gone": ("authority", OURS, -99, -9, "authority"),
    "good": ("authority", OURS, -99, 99, "leaf"),
    "soon": ("authority", OURS, -99, 5, "leaf"),
    "old": ("authority", OURS, -12000, 99, "leaf"),
    "expired": ("authority", OURS, -99, -9, "leaf"),
    "future": ("authority", OURS, 9, 99, "leaf"),
    "wrong": ("authority", OTHER, -99, 99, "leaf"),
    "no-ip": ("authority", "DNS:localhost", -99, 99, "leaf"),
    "expired-wrong": ("authority", OTHER, -99, -9, "leaf"),
    "localhost": (
        "authority",
        OTHER,
        -99,
        99,
        "leaf",
    ),  # each has its own name as CN, which browsers do not read
    "for-clients": ("authority", OURS, -99, 99, "client"),
    "stranger": ("other-authority", OURS, -99, 99, "leaf"),
    "old-stranger": ("other-authority", OURS, -12000, 99, "leaf"),
    "orphan": ("middle", OURS, -99, 99, "leaf"),
    "expired-stranger": ("other-authority", OURS, -99, -9, "leaf"),
    "expired-middle": ("gone", OURS, -99, 99, "leaf"),
    "self-signed": ("", OURS, -99, 99, "leaf"),
    "self-signed-wrong": ("", OTHER, -99, 99, "leaf"),
    "self-signed-expired-wrong": ("", OTHER, -99, -9, "leaf"),
}  # type: Dict[str, Any]


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: Any) -> Any:
    """A folder of NAME.pem: key, certificate, and an intermediate one if it is sent; authority.crt is the anchor."""
    folder = tmp_path_factory.mktemp("certificates")
    (folder / "openssl.cnf").write_text(OPENSSL_CA)
    (folder / "index").write_text("")
    (folder / "serial").write_text("01\n")

    def openssl(words: str, san: str = OURS) -> None:
        done = subprocess.run(
            ["openssl"] + words.split(),
            cwd=str(folder),
            env=dict(os.environ, SAN=san),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == 0, done.stdout

    openssl("ecparam -genkey -name prime256v1 -noout -out key")
    for name, (issuer, san, begin, end, extensions) in CERTIFICATES.items():
        openssl("req -new -config openssl.cnf -key key -subj /CN=%s -out request" % name, san)
        dates = [
            time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + days * DAY))
            for days in (begin, end)
        ]
        openssl(
            " ".join(
                [
                    "ca -batch -notext -config openssl.cnf -in request -out %s.crt -keyfile key"
                    % name,
                    "-extensions",
                    extensions,
                    "-startdate",
                    dates[0],
                    "-enddate",
                    dates[1],
                    "-cert %s.crt" % issuer if issuer else "-selfsign",
                ]
            ),
            san,
        )
        sent = [name + ".crt"] + (["gone.crt"] if issuer == "gone" else [])
        (folder / (name + ".pem")).write_text(
            "".join((folder / part).read_text() for part in ["key"] + sent)
        )
    return folder


# ---- Sites -----------------------------------------------------------------------------------------------------------

Script = Callable[[socket.socket, threading.Event], None]
Answer = Union[bytes, Dict[str, bytes], Script]


class Canned:
    """A server that answers every request with the same bytes, with those of its path ("": of all others), or as a
    script does; PATH in the bytes is the request's."""

    def __init__(self, certificate: str = "") -> None:
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.requests = []  # type: List[bytes]
        self.ports = {}  # type: Dict[bytes, bytes]
        self.over = threading.Event()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if certificate else None
        if self.context:
            self.context.load_cert_chain(certificate)

    def start(self, answer: Answer) -> None:
        self.answer = answer
        self.listener.listen(50)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(
                    target=self._talk, args=(self.listener.accept()[0],), daemon=True
                ).start()

    def _talk(self, sock: socket.socket) -> None:
        sock.settimeout(5)
        with contextlib.suppress(OSError):
            sock = self.context.wrap_socket(sock, server_side=True) if self.context else sock
            with sock:
                data = sock.recv(8192)
                if data:
                    self.requests.append(data)
                    if callable(self.answer):
                        self.answer(sock, self.over)
                    else:
                        path = data.partition(b" ")[2].partition(b" ")[0]
                        answers = (
                            self.answer if isinstance(self.answer, dict) else {"": self.answer}
                        )
                        answer = answers.get(path.decode("latin-1"), answers[""]).replace(
                            b"PATH", path
                        )
                        for name, port in self.ports.items():
                            answer = answer.replace(name, port)
                        sock.sendall(answer)
        sock.close()

    def close(self) -> None:
        self.over.set()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def says(status: str, *fields: str, body: str = "") -> bytes:
    lines = ("HTTP/1.1 " + status,) + fields + ("Content-Length: %d" % len(body), "", body)
    return "\r\n".join(lines).encode("latin-1")


def to(location: str, *fields: str, status: str = "301 Moved") -> bytes:
    return says(status, "Location: " + location, *fields)


YEAR = "Strict-Transport-Security: max-age=31536000"
HOME = says("200 OK", YEAR, body="mail")
P, S = "http://localhost:PLAIN", "https://localhost:SECURE"
GOOD, PAGE = to(S + "/exchange"), says("200 OK", body="mail")
ALL_GOOD = "redirection-to-https"
INVALID = "redirects.http.first_redirect.invalid"
CERT = "redirection-invalid-cert."
IIS5 = says(
    "403 Access Forbidden",
    "Server: Microsoft-IIS/5.0",
    "Content-Type: text/html",
    body="""\
<html dir=ltr><head><title>The page must be viewed over a secure channel</title></head><body>
<h1>The page must be viewed over a secure channel</h1>The page you are trying to view requires the use of "https" in the
address.<p>Please try the following:<ul><li>Try again by typing https:// at the beginning of the address you are
attempting to reach.</ul>
<h2>HTTP 403.4 - Forbidden: SSL required<br>Internet Information Services</h2></body></html>""",
)
IIS7 = says(
    "403 Forbidden",
    "Server: Microsoft-IIS/7.5",
    "Content-Type: text/html; charset=utf-8",
    body="""\
<html><head><title>IIS 7.5 Detailed Error - 403.4 - Forbidden</title></head><body><h2>HTTP Error 403.4 - Forbidden</h2>
<h3>The page you are trying to access is secured with Secure Sockets Layer (SSL).</h3></body></html>""",
)


class Case(NamedTuple):
    what: str
    expected: str  # the ids of all findings
    code: int
    plain: Optional[Answer] = GOOD
    secure: Optional[Answer] = HOME
    certificate: str = "good"
    options: str = ""
    target: str = "localhost:PLAIN"


SITE_CASES = [
    Case("a right redirect", ALL_GOOD, 0),
    Case("the wrong path, none is expected", ALL_GOOD, 0, to(S + "/elsewhere")),
    Case(
        "the expected path",
        ALL_GOOD,
        0,
        options="--path /exchange --status 301 --https-port SECURE",
    ),
    Case("path and query kept", ALL_GOOD, 0, to(S + "PATH"), options="--keep-path"),
    Case(
        "path and query expected to be kept",
        "redirection-to-https rule-mismatch",
        2,
        options="--keep-path",
    ),
    Case("the wrong path", "rule-mismatch", 2, options="--path /owa"),
    Case("the wrong status", "rule-mismatch", 2, options="--status 308"),
    Case("the wrong port", "rule-mismatch", 2, options="--https-port 444"),
    Case(
        "another host, which is the expected one",
        ALL_GOOD,
        0,
        to("https://127.0.0.1:SECURE/exchange"),
        options="--host 127.0.0.1",
    ),
    Case("not the expected host", "rule-mismatch", 2, options="--host 127.0.0.1"),
    Case(
        "another host", "redirection-off-host-from-http", 1, to("https://127.0.0.1:SECURE/exchange")
    ),
    Case(
        "another host, with the right path",
        "rule-mismatch",
        2,
        to("https://127.0.0.1:SECURE/exchange"),
        options="--path /exchange",
    ),
    Case("temporary", ALL_GOOD + " redirection-temporary", 0, to(S + "/", status="302 Found")),
    Case(
        "temporary, as expected",
        ALL_GOOD,
        0,
        to(S + "/", status="302 Found"),
        options="--status 302",
    ),
    Case("lines end in LF alone, as browsers allow", ALL_GOOD, 0, GOOD.replace(b"\r", b"")),
    Case("IIS 5 answers 403.4", "iis-403.4", 2, IIS5),
    Case("IIS 7 answers 403.4", "iis-403.4", 2, IIS7),
    Case(
        "IIS answers 403.6",
        "redirection-missing",
        2,
        says("403 Forbidden", "Server: Microsoft-IIS/10.0", body="HTTP Error 403.6 - Forbidden"),
    ),
    Case("any 403", "redirection-missing", 2, says("403 Forbidden", body="<h1>Forbidden</h1>")),
    Case(
        "Owahttps.asp on another port",
        "iis-asp-port-test",
        2,
        says("200 OK", "Server: Microsoft-IIS/5.0"),
    ),
    Case("200 in clear", "redirection-missing", 2, HOME.replace(b"Strict", b"No")),
    Case("421 in clear", "redirection-missing", 2, says("421 Misdirected Request")),
    Case(
        "304 is no redirect",
        "redirection-missing",
        2,
        says("304 Not Modified", "Location: https://localhost:SECURE/"),
    ),
    Case(
        "plain HTTP and back, for ever",
        "redirection-to-https redirects.insecure.subsequent redirects.too_many.loop",
        2,
        GOOD,
        to(P + "/", YEAR),
    ),
    Case(
        "itself, for ever",
        "redirection-not-to-https-on-initial-redirection redirects.too_many.loop",
        2,
        to(P + "PATH"),
    ),
    Case(
        "the redirect behind a load balancer that ends TLS",
        "redirection-to-https redirects.too_many.loop",
        2,
        GOOD,
        to(S + "/exchange", YEAR),
    ),
    Case(
        "the load balancer is told",
        "proxy-loop redirection-to-https",
        2,
        GOOD,
        says("421 Misdirected Request", YEAR),
    ),
    Case(
        "endless redirects",
        "redirection-to-https redirects.too_many redirects.too_many.loop",
        2,
        GOOD,
        to(S + "PATHx", YEAR),
    ),
    Case(
        "five hops from each of three addresses",
        ALL_GOOD + " redirects.too_many",
        1,
        to(S + "PATH"),
        {
            path + "x" * number: to(S + path + "x" * (number + 1), YEAR) if number < 4 else HOME
            for path in ("", "/", "/exchange", "/exchange/inbox/?cmd=contents&x=a%2Fb")
            for number in range(5)
        },
    ),
    Case("three hops", ALL_GOOD, 0, to(S + "/2"), {"/2": to(S + "/3", YEAR), "": HOME}),
    Case(
        "four hops",
        ALL_GOOD + " redirects.too_many",
        1,
        to(S + "/2"),
        {"/2": to(S + "/3", YEAR), "/3": to(S + "/4", YEAR), "/4": to(S + "/5", YEAR), "": HOME},
    ),
    Case(
        "downgrade at hop 2",
        ALL_GOOD + " redirects.insecure.subsequent",
        2,
        {"/3": to(S + "/4"), "": to(S + "/2")},
        {"/2": to(P + "/3", YEAR), "": HOME},
    ),
    Case(
        "last hop http",
        "redirection-not-to-https redirection-to-https redirects.insecure.subsequent",
        2,
        {"/3": PAGE, "": to(S + "/2")},
        to(P + "/3", YEAR),
    ),
    Case(
        "the next hop http, the last https",
        "redirection-not-to-https-on-initial-redirection",
        2,
        {"/2": GOOD, "": to(P + "/2")},
    ),
    Case(
        "the root alone redirects",
        "redirection-missing redirection-to-https",
        2,
        {"/": GOOD, "": PAGE},
    ),
    Case(
        "the root does not redirect",
        "redirection-missing redirection-to-https",
        2,
        {"/": PAGE, "": GOOD},
    ),
    Case(
        "the deep link does not redirect",
        "redirection-missing redirection-to-https",
        2,
        {"/exchange/inbox/?cmd=contents&x=a%2Fb": PAGE, "": GOOD},
    ),
    Case(
        "the path of --path does not redirect",
        "redirection-missing redirection-to-https",
        2,
        {"/owa": PAGE, "": to(S + "/owa")},
        options="--path /owa",
    ),
    Case(
        "the plain port is kept",
        "domain.tls.cannot_connect location-keeps-plain-port",
        2,
        to("https://localhost:PLAIN/"),
    ),
    Case(
        "relative",
        "redirection-not-to-https-on-initial-redirection redirection-relative redirects.too_many.loop",
        2,
        to("/exchange"),
    ),
    Case(
        "no scheme",
        "redirection-not-to-https-on-initial-redirection redirection-relative redirects.too_many.loop",
        2,
        to("//localhost:PLAIN/exchange"),
    ),
    Case(
        "relative over https is right",
        ALL_GOOD,
        0,
        secure={"/exchange": to("logon.aspx?url=x", YEAR), "": HOME},
    ),
    Case("no Location", INVALID, 2, says("302 Found")),
    Case("no answer over https", "domain.tls.cannot_connect redirection-to-https", 2, secure=None),
    Case(
        "plain HTTP over https", "domain.tls.cannot_connect redirection-to-https", 2, certificate=""
    ),
    Case("only https", "redirection-not-needed-no-http", 0, None, options="--https-port SECURE"),
    Case(
        "only https, which hangs up", "http-no-answer", 2, None, b"", options="--https-port SECURE"
    ),
    Case(
        "nothing at all",
        "domain.tls.cannot_connect http-no-answer",
        2,
        None,
        None,
        options="--https-port SECURE",
    ),
    Case(
        "a redirect to nowhere",
        "domain.tls.cannot_connect redirection-off-host-from-http",
        2,
        to("https://nowhere.invalid/"),
    ),
    Case("a name that no DNS has", "host-unknown", 3, target="nowhere.invalid"),
    Case("no IPv6 address", "host-unknown", 3, target="127.0.0.1:PLAIN", options="-6"),
    Case(
        "an IPv4 address",
        ALL_GOOD,
        0,
        to("https://127.0.0.1:SECURE/"),
        target="127.0.0.1:PLAIN",
        options="-4",
    ),
    Case("no HSTS", ALL_GOOD + " response.no_header", 1, secure=says("200 OK")),
    Case(
        "HSTS of a month",
        ALL_GOOD + " header.preloadable.max_age.too_low",
        1,
        secure=HOME.replace(b"31536000", b"2592000; includeSubDomains"),
    ),
    Case(
        "HSTS of ten months",
        ALL_GOOD + " header.preloadable.max_age.below_1_year",
        0,
        secure=HOME.replace(b"315", b"265"),
    ),
    Case(
        "HSTS with quotes and more",
        ALL_GOOD,
        0,
        secure=HOME.replace(b"max-age=31536000", b'preload; MAX-AGE = "31536000"'),
    ),
    Case(
        "HSTS without max-age",
        ALL_GOOD + " response.no_header",
        1,
        secure=HOME.replace(b"max-age", b"x"),
    ),
    Case("HSTS in clear", ALL_GOOD + " redirects.http.useless_header", 1, to(S + "/", YEAR)),
    Case(
        "a Secure with a value",
        ALL_GOOD,
        0,
        secure=says("200 OK", YEAR, "Set-Cookie: a=b; Path=/; Secure=true"),
    ),
    Case(
        "a cookie that is deleted",
        ALL_GOOD,
        0,
        to(S + "/", "Set-Cookie: a=; Max-Age=0"),
        says("200 OK", YEAR, "Set-Cookie: a=", "Set-Cookie: "),
    ),
    Case("two Locations", INVALID, 2, to(S + "/", "Location: http://evil.invalid/")),
    Case("two Locations, equal", ALL_GOOD, 0, to(S + "/", "Location: " + S + "/")),
    Case(
        "HTTPS that is broken",
        ALL_GOOD + " https-error",
        1,
        secure=says("500 Internal Server Error", YEAR),
    ),
    Case(
        "only https, which leads to plain HTTP",
        "http-no-answer redirects.insecure.subsequent",
        2,
        None,
        to(P + "/", YEAR),
        options="--https-port SECURE",
    ),
    Case(
        "only https, for ever",
        "redirects.too_many.loop",
        2,
        None,
        to(S + "PATH", YEAR),
        options="--https-port SECURE",
    ),
    Case(
        "a cookie in clear",
        ALL_GOOD + " cookie-over-http",
        1,
        to(S + "/", "Set-Cookie: a=b; Secure"),
    ),
    Case(
        "a cookie without Secure",
        ALL_GOOD + " cookie-without-secure",
        1,
        secure=says("200 OK", YEAR, "Set-Cookie: a=b; SECURE", "Set-Cookie: secure=1; HttpOnly"),
    ),
    Case("a certificate that begins in the 20th century", ALL_GOOD, 0, certificate="old"),
    Case("expires soon", ALL_GOOD + " cert-expires-soon", 1, certificate="soon"),
    Case("expired", CERT + "expired " + ALL_GOOD, 2, certificate="expired"),
    Case("not yet valid", CERT + "not-yet-valid " + ALL_GOOD, 2, certificate="future"),
    Case("another name", CERT + "name " + ALL_GOOD, 2, certificate="wrong"),
    Case("the name in CN alone", CERT + "name " + ALL_GOOD, 2, certificate="localhost"),
    Case(
        "the name, but asked for by address",
        CERT + "name " + ALL_GOOD,
        2,
        to("https://127.0.0.1:SECURE/"),
        certificate="no-ip",
        target="127.0.0.1:PLAIN",
    ),
    Case(
        "expired and another name",
        CERT + "expired " + CERT + "name " + ALL_GOOD,
        2,
        certificate="expired-wrong",
    ),
    Case("not for servers", CERT + "chain " + ALL_GOOD, 2, certificate="for-clients"),
    Case("an authority that nobody trusts", CERT + "chain " + ALL_GOOD, 2, certificate="stranger"),
    Case(
        "the same, begun in the 20th century",
        CERT + "chain " + ALL_GOOD,
        2,
        certificate="old-stranger",
    ),
    Case(
        "the same, expired",
        CERT + "chain " + CERT + "expired " + ALL_GOOD,
        2,
        certificate="expired-stranger",
    ),
    Case(
        "the intermediate certificate is not sent",
        CERT + "chain " + ALL_GOOD,
        2,
        certificate="orphan",
    ),
    Case(
        "the intermediate certificate expired",
        CERT + "chain " + ALL_GOOD,
        2,
        certificate="expired-middle",
    ),
    Case("self-signed", CERT + "self-signed " + ALL_GOOD, 2, certificate="self-signed"),
    Case(
        "self-signed, another name",
        CERT + "name " + CERT + "self-signed " + ALL_GOOD,
        2,
        certificate="self-signed-wrong",
    ),
    Case(
        "all at once",
        CERT + "expired " + CERT + "name " + CERT + "self-signed " + ALL_GOOD,
        2,
        certificate="self-signed-expired-wrong",
    ),
]


class Site:
    """The two servers of a case, while its `with` lasts."""

    def __init__(self, case: Case, folder: Any) -> None:
        pem = str(folder / (case.certificate + ".pem")) if case.certificate else ""
        self.plain, self.secure = Canned(), Canned(pem)
        self.plain.ports = self.secure.ports = {
            name: self.ports(name.decode()).encode() for name in (b"PLAIN", b"SECURE")
        }
        self.servers = [(self.plain, case.plain), (self.secure, case.secure)]
        self.words = [
            "check",
            "--ca-file",
            str(folder / "authority.crt"),
            "--timeout",
            "5",
        ] + self.ports(case.options + " " + case.target).split()
        if "localhost" in case.target:
            self.words += ["--connect", "127.0.0.1:%d" % self.plain.port]

    def ports(self, text: str) -> str:
        return text.replace("PLAIN", str(self.plain.port)).replace("SECURE", str(self.secure.port))

    def __enter__(self) -> "Site":
        for server, answer in self.servers:
            if answer is not None:
                server.start(answer)
        return self

    def __exit__(self, *_: Any) -> None:
        self.plain.close()
        self.secure.close()

    def requests(self) -> List[bytes]:
        return self.plain.requests + self.secure.requests


def ids(report: Dict[str, Any]) -> str:
    return " ".join(sorted({finding["id"] for finding in report["findings"]}))


def judge(site: Site, capsys: Any) -> Any:
    """The report of `check --json` on this site, with its exit code; what holds for every site is asserted here."""
    code = owahttps.main(site.words + ["--json"])
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == 1
    report = json.loads(out)
    assert list(report) == ["target", "severity", "hops", "findings"]
    for hop in report["hops"]:
        assert list(hop) == ["url", "status", "location", "milliseconds"]
    for finding in report["findings"]:
        assert list(finding) == ["id", "severity", "text"] and re.fullmatch(
            "[ -~]+", finding["text"]
        )
    assert code == owahttps.EXIT_CODES[report["severity"]]
    assert len(site.requests()) <= 20
    for request in [
        data for data in site.requests() if data[:1] != b"\x16"
    ]:  # no credential, no body
        assert re.fullmatch(
            rb"GET /[!-~]* HTTP/1\.1\r\nHost: [!-~]+\r\nUser-Agent: owahttps/[0-9.]+\r\n"
            rb"Accept: \*/\*\r\nConnection: close\r\n\r\n",
            request,
        )
    return report, code


@needs_openssl
@pytest.mark.parametrize("case", SITE_CASES, ids=[case.what for case in SITE_CASES])
def test_finds(case: Case, certificates: Any, capsys: Any) -> None:
    with Site(case, certificates) as site:
        report, code = judge(site, capsys)
        assert (ids(report), code) == (" ".join(sorted(case.expected.split())), case.code), report


@pytest.mark.parametrize(
    "field, age",
    [
        ("max-age=31536000", 31536000),
        ("Max-Age=0", 0),
        (' max-age = "5" ; ; includeSubDomains;;preload ', 5),
        (";max-age=1", 1),
        ("max-age=" + "0" * 30 + "7", 7),
        ('max-age=1; x="a;max-age=2"', 1),
        ("max-age=1; includeSubDomains", 1),
        ("", None),
        ("max-age", None),
        ("max-age=", None),
        ("max-age=-1", None),
        ("max-age=1.5", None),
        ("max-age=1abc", None),
        ("max-age=1 includeSubDomains", None),
        ("max-age=1,max-age=1", None),
        ("max-age=1; max-age=0", None),
        ('max-age="1', None),
        ('x="; max-age=1"', None),
        ("includeSubDomains; includesubdomains; max-age=1", None),
        ("max-age=1; includeSubDomains=x", None),
        ("max-age=1" + " " * 60000, 1),
        ("max-age=1;" + " " * 60000 + '"', None),
        ("a" + " " * 60000 + '"', None),
        ("a;" * 30000 + '"', None),
        ('a="' + "\\" * 60000, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_max_age(field, age):
    """As browsers read it: one fault and there is none; no field of 64 KB may take long."""
    start = time.monotonic()
    assert owahttps.max_age(field) == age and time.monotonic() - start < 1


# ---- Hostile servers -------------------------------------------------------------------------------------------------


def endless(start: bytes, again: bytes) -> Script:
    def script(sock: socket.socket, over: threading.Event) -> None:
        sock.sendall(start)
        while not over.is_set():
            sock.sendall(again)

    return script


def drip(start: bytes, again: bytes) -> Script:
    def script(sock: socket.socket, over: threading.Event) -> None:
        sock.sendall(start)
        while not over.wait(0.02):
            sock.sendall(again)

    return script


def stall(sock: socket.socket, over: threading.Event) -> None:
    over.wait(5)


def reset(sock: socket.socket, over: threading.Event) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


SHORT = "--timeout 0.1"
HOSTILE_SITES = [
    Case("endless headers", "http-garbled", 2, endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 999)),
    Case(
        "one endless header",
        "http-garbled",
        2,
        endless(b"HTTP/1.1 301 Moved\r\nLocation: https://a.b/", b"x" * 9999),
    ),
    Case(
        "endless body", "redirection-missing", 2, endless(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 9999)
    ),
    Case("endless status line", "http-garbled", 2, endless(b"HTTP/1.1 200 ", b"x" * 9999)),
    Case(
        "a head that drips",
        "http-no-answer",
        2,
        drip(b"HTTP/1.1 301 Moved\r\nX: ", b"x"),
        options=SHORT,
    ),
    Case(
        "a body that drips",
        "redirection-missing",
        2,
        drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
        options=SHORT,
    ),
    Case(
        "a redirect that leaves the connection open",
        INVALID,
        2,
        drip(b"HTTP/1.1 301 Moved\r\n\r\n", b""),
    ),
    Case(
        "an interim answer, then silence",
        "http-no-answer",
        2,
        drip(b"HTTP/1.1 103 Early Hints\r\n\r\n", b""),
        options=SHORT,
    ),
    Case("no answer at all", "http-no-answer", 2, stall, options=SHORT),
    Case("closed at once", "http-no-answer", 2, lambda sock, over: None),
    Case("reset", "http-no-answer", 2, reset),
    Case(
        "a head without its end",
        "http-garbled",
        2,
        b"HTTP/1.1 301 Moved\r\nLocation: https://localhost:SECURE/exch",
    ),
    Case("TLS on the plain port", "http-garbled", 2, b"\x15\x03\x01\x00\x02\x02\x46"),
    Case("SSH", "http-garbled", 2, b"SSH-2.0-OpenSSH\r\n\r\n"),
    Case("a status that is none", "http-garbled", 2, b"HTTP/1.1 9999999999 \x1b[31m\r\n\r\n"),
    Case("HTTP/0.9", "http-garbled", 2, b"<h1>\x1b]0;owned\x07</h1>\r\n\r\n"),
    Case("nothing but line ends", "http-garbled", 2, b"\r\n" * 50),
    Case(
        "HTTP/1.1 over https is garbled",
        "http-garbled redirection-to-https",
        2,
        secure=b"\x1b[2J\r\n\r\n",
    ),
    Case(
        "no answer over https",
        "http-no-answer redirection-to-https",
        2,
        secure=stall,
        options=SHORT,
    ),
    Case(
        "no handshake",
        "domain.tls.cannot_connect redirection-to-https",
        2,
        secure=stall,
        certificate="",
        options=SHORT,
    ),
    Case("HSTS with 5,000 digits", ALL_GOOD, 0, secure=says("200 OK", YEAR + "0" * 5000)),
    Case(
        "HSTS with a sign",
        ALL_GOOD + " response.no_header",
        1,
        secure=says("200 OK", "Strict-Transport-Security: max-age=-31536000"),
    ),
    Case("a port with 5,000 digits", INVALID, 2, to("https://localhost:" + "9" * 5000)),
    Case("a name with 60,000 letters", INVALID, 2, to("https://" + "a" * 60000)),
    Case("a name with 60,000 labels", INVALID, 2, to("https://" + "a." * 30000)),
] + [
    Case("Location %a" % location, INVALID, 2, to(location))
    for location in (
        "https://localhost/\x1b[2Jx",
        "https://localhost/\r",
        "https://local\rhost/",
        "https://localhost/\t/",
        "https://localhost/\0",
        "https://localhost/\xff",
        "https://localhost/\x9b2J",
        "https://loc\xe4lhost/",
        "https://localhost/ x",
        "\x7f",
        "",
        "https://",
        "https:///",
        "https://localhost:0/",
        "https://localhost:65536/",
        "https://localhost:x/",
        "https://[::1/",
        "https://user@localhost/",
        "https://localhost\\@evil.invalid/",
        "https://[fe80::1%25lo]/",
        "https://1.2.3/",
        "https://-/",
        "javascript:alert(1)",
        "ftp://localhost/",
        "file:///etc/passwd",
        "mailto:a@b.invalid",
        "https://{0.__class__}/",
        "https://..",
    )
]


@needs_openssl
@pytest.mark.parametrize("case", HOSTILE_SITES, ids=[case.what[:40] for case in HOSTILE_SITES])
def test_hostile_server(case: Case, certificates: Any, capsys: Any) -> None:
    """Whatever comes: a finding and no traceback, within a few deadlines, and nothing for the terminal to obey."""
    with Site(case, certificates) as site:
        start = time.monotonic()
        report, code = judge(site, capsys)
        assert time.monotonic() - start < 4
        assert (ids(report), code) == (" ".join(sorted(case.expected.split())), case.code), report
        assert len(json.dumps(report)) < 40000
        if case.options != SHORT:
            owahttps.main(site.words)
            out, err = capsys.readouterr()
            assert err == "" and re.fullmatch(r"[ -~\n]+", out)


def test_an_empty_port_is_none():
    assert owahttps.parse_url("http://a:/x") == owahttps.parse_url("http://a/x")


@needs_openssl
@pytest.mark.parametrize(
    "location, reflects",
    [
        ("https://HOST/", True),
        ("https://X@FORGED.invalid/", True),
        ("https://localhost/?from=HOST", True),
        ("https://localhost/", False),
    ],
)
def test_forged_host(location: str, reflects: bool, certificates: Any, capsys: Any) -> None:
    """A Host that is no host must not come back in Location without a word: caches would keep it for everybody."""

    def script(sock: socket.socket, over: threading.Event) -> None:
        host = (
            re.findall(b"Host: (.*?)\r\n", site.plain.requests[-1])[0].rpartition(b":")[0]
            or b"x@forged.invalid"
        )
        sock.sendall(to(location).replace(b"HOST", host))

    with Site(Case("", "", 0, script), certificates) as site:
        report, _ = judge(site, capsys)
        assert ("host-reflected" in ids(report)) == reflects


@needs_openssl
@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 301 Moved\r\n", b""])
def test_memory_is_bounded(start: bytes, certificates: Any) -> None:
    """An endless answer must not fill the memory: check stops reading."""
    with Site(Case("", "", 2, endless(start, b"x" * 60000)), certificates) as site:
        tracemalloc.start()
        try:
            owahttps.check("127.0.0.1:%d" % site.plain.port, seconds=2)
            assert tracemalloc.get_traced_memory()[1] < 4000000
        finally:
            tracemalloc.stop()


# ---- Our own servers, and the command line ---------------------------------------------------------------------------


def test_our_listener_and_stub(tmp_path: Any, capsys: Any) -> None:
    (tmp_path / "stub.pem").write_text(owahttps.STUB_CERTIFICATE)
    with owahttps.running(owahttps.StubServer(("127.0.0.1", 0))) as stub:
        for status, expected in (302, "redirection-temporary " + ALL_GOOD), (308, ALL_GOOD):
            rule = owahttps.RedirectRule(https_port=stub[1], status=status)
            with owahttps.running(owahttps.RedirectServer(("127.0.0.1", 0), rule=rule)) as (
                _,
                port,
            ):
                code = owahttps.main(
                    [
                        "check",
                        "--json",
                        "--ca-file",
                        str(tmp_path / "stub.pem"),
                        "127.0.0.1:%d" % port,
                    ]
                )
                assert (ids(json.loads(capsys.readouterr().out)), code) == (expected, 0)


@needs_openssl
def test_our_listener_behind_a_load_balancer(certificates: Any, capsys: Any) -> None:
    """A load balancer that ends TLS and asks the listener again: a loop must be named, with its cure."""

    def relay(sock: socket.socket, over: threading.Event) -> None:
        with socket.create_connection(address) as there:
            there.sendall(
                site.secure.requests[-1].replace(
                    b"\r\n\r\n", b"\r\nX-Forwarded-Proto: https\r\n\r\n"
                )
            )
            sock.sendall(there.recv(9999))

    with Site(Case("", "", 2, None, relay), certificates) as site:
        rule = owahttps.RedirectRule(https_port=site.secure.port, status=301)
        with owahttps.running(owahttps.RedirectServer(("127.0.0.1", 0), rule=rule)) as address:
            site.words[-3:] = ["127.0.0.1:%d" % address[1]]
            report, code = judge(site, capsys)
            assert (ids(report), code) == ("proxy-loop redirection-to-https", 2)


def test_demo_before() -> None:
    """The demo answers 403.4, also while a connection that a browser opened ahead says nothing."""
    demo = subprocess.Popen(
        [sys.executable, SCRIPT, "demo", "--before", "--port", "0", "--https-port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        universal_newlines=True,
    )
    try:
        port = re.findall("[0-9]+", demo.stdout.readline())[0]  # type: ignore
        with socket.create_connection(("127.0.0.1", int(port))):
            code, out, err = run("check", "--timeout", "2", "127.0.0.1:" + port)
        assert code == 2 and err == ""
        assert "iis-403.4" in out and "steps 5-10 of Q279681" in out
    finally:
        demo.terminate()
        demo.communicate()


@needs_openssl
def test_text(certificates: Any) -> None:
    """The whole output, for a person, for cron, and coloured by nobody's wish."""
    with Site(Case("", "", 2, {"/": PAGE, "": GOOD}), certificates) as site:
        code, out, err = run(*site.words)
        assert (code, err) == (2, "")
        assert re.sub(" +[0-9]+ ms", " N ms", out) == site.ports("""\
critical  localhost:PLAIN
 N ms  200  http://localhost:PLAIN/
 N ms  301  http://localhost:PLAIN/exchange -> https://localhost:SECURE/exchange
 N ms  200  https://localhost:SECURE/exchange
 N ms  301  http://localhost:PLAIN/exchange/inbox/?cmd=contents&x=a%2Fb -> https://localhost:SECURE/exchange
  critical  redirection-missing  http://localhost:PLAIN/ answers 200 in clear: redirect it to https
  ok        redirection-to-https  http://localhost:PLAIN/exchange goes to https://localhost:SECURE/exchange
""")
        code, out, err = run(*(site.words + ["--quiet"]))
        assert (code, err, out) == (
            2,
            "",
            site.ports("""\
critical  localhost:PLAIN
  critical  redirection-missing  http://localhost:PLAIN/ answers 200 in clear: redirect it to https
"""),
        )


@linux
def test_an_interrupt_ends_check_at_once():
    """Ctrl-C must never wait for what is asked and to be asked."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(99)
        target = "127.0.0.1:%d" % silent.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, SCRIPT, "check", "--timeout", "20"] + [target] * 40
        )
        silent.accept()[0].close()
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert (
            process.wait(10) == -signal.SIGINT and time.monotonic() - start < 3
        )  # what a shell calls 130


@needs_openssl
def test_quiet_says_nothing_of_what_is_good(certificates: Any, capsys: Any) -> None:
    with Site(Case("", "", 0, to(S, status="302 Found")), certificates) as site:
        assert owahttps.main(site.words + ["--quiet"]) == 0
        assert capsys.readouterr() == ("", "")


@needs_openssl
def test_several_targets_in_order(certificates: Any, capsys: Any) -> None:
    """The slow one comes first all the same, and the worst one decides."""
    with (
        Site(Case("", "", 0, stall), certificates) as slow,
        Site(Case("", "", 0, IIS5), certificates) as fast,
    ):
        targets = [
            "127.0.0.1:%d" % slow.plain.port,
            "127.0.0.1:%d" % fast.plain.port,
            "nowhere.invalid",
        ]
        assert owahttps.main(["check", "--json", "--timeout", "0.1"] + targets) == 2
        reports = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [report["target"] for report in reports] == targets
        assert [ids(report) for report in reports] == [
            "http-no-answer",
            "iis-403.4",
            "host-unknown",
        ]


@needs_openssl
def test_every_address_counts(certificates: Any, monkeypatch: Any) -> None:
    """An address where nothing listens must not hide behind one that answers, nor the other way round."""

    def both(host: str, port: int, *rest: Any) -> Any:
        names = ("127.0.0.1", "127.0.0.2") if host == "two.invalid" else (host,)
        return [row for name in names for row in getaddrinfo(name, port, *rest)]

    getaddrinfo = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", both)
    with Site(Case("", "", 0, IIS5), certificates) as site:
        report = owahttps.check("two.invalid:%d" % site.plain.port, seconds=2)
        assert {(finding.id, finding.text[-14:]) for finding in report.findings} == {
            ("iis-403.4", "[at 127.0.0.1]"),
            ("domain.tls.cannot_connect", "[at 127.0.0.2]"),
            ("http-no-answer", "[at 127.0.0.2]"),
        }


@pytest.mark.parametrize("number", [errno.ENETUNREACH, errno.EAFNOSUPPORT])
def test_no_way_to_the_address(number: int, monkeypatch: Any) -> None:
    """A machine without IPv6 must not call a site broken for its AAAA record."""

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket, "create_connection", refuse)
    report = owahttps.check("[2001:db8::1]")
    assert [finding.id for finding in report.findings] == [
        "address-unreachable"
    ] and report.severity == "unknown"


WRONG_USAGE = [
    "",
    "--nope localhost",
    "https://localhost/",
    "ftp://localhost/",
    "http://a@b/",
    "..",
    "localhost:0",
    "localhost:65536",
    "localhost \x1b[31m",
    "b\xfccher.example",
    "--timeout 0 localhost",
    "--timeout -1 localhost",
    "--timeout nan localhost",
    "--timeout inf localhost",
    "--timeout 1e99 localhost",
    "--path x localhost",
    "--status 303 localhost",
    "--https-port 0 localhost",
    "--host a:1 localhost",
    "--ca-file /nowhere localhost",
    "--ca-file /dev/null localhost",
    "--connect x:y localhost",
    "--connect https://x localhost",
]


@pytest.mark.parametrize("words", WRONG_USAGE)
def test_wrong_usage(words: str, monkeypatch: Any, capsys: Any) -> None:
    """Exit 3 and one line, before anything is asked: no traceback, no escape for the terminal, no half a report."""
    monkeypatch.setattr(owahttps, "check", None)
    try:
        code = owahttps.main(["check"] + words.split())
    except SystemExit as leaving:
        code = leaving.code  # type: ignore
    out, err = capsys.readouterr()
    assert (code, out) == (3, "") and re.fullmatch(r"owahttps[ -~]+\n", err)


def test_many_interim_answers():
    """They are taken off one by one: a regular expression over all of them could take for ever."""
    start = time.monotonic()
    assert owahttps._final(b"HTTP/1.1 100 Continue\r\n\r\n" * 2600 + b"x") == b"x"
    assert time.monotonic() - start < 1


def test_an_early_hint_is_no_answer():
    """An interim answer must never be judged as the final one."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)

        def answer():
            client = listener.accept()[0]
            with client:
                client.recv(9999)
                client.sendall(
                    b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
                    + to("https://a/", status="302 Found")
                )

        threading.Thread(target=answer).start()
        url = owahttps.Url("http", "localhost", 80, "/")
        response = owahttps.fetch(url, listener.getsockname(), None, "localhost", 5)
        assert (response.status, response.field("location")) == (302, "https://a/")


# ---- The self-test, sabotaged ----------------------------------------------------------------------------------------


def failing():
    return [
        (what, expected, got)
        for what, expected, got in owahttps.try_ourselves()
        if got not in expected.split("|")
    ]


def test_selftest_against_a_server_that_drips():
    """A byte now and then must not hold a case beyond its seconds."""
    server = Canned()
    server.start(drip(b"HTTP/1.1 3", b"x"))
    start = time.monotonic()
    assert b"(left open)" in owahttps._conversation(("127.0.0.1", server.port), get().encode(), 0.2)
    assert time.monotonic() - start < 3
    server.close()


def test_selftest_passes_in_time():
    start = time.monotonic()
    code, out, err = run("selftest")
    assert (code, err) == (0, "") and time.monotonic() - start < 5
    assert out.splitlines()[-1] == "%d checks, 0 failed" % out.count("ok   ") and "\033" not in out


@pytest.mark.parametrize(
    "fields",
    [
        dict(allow_hosts=("mail.test",)),
        dict(allow_hosts=("mail.example.com",)),
        dict(host="mail.test", allow_hosts=("other.test",)),
        dict(host="mail.test", keep_path=True, status=308, https_port=8443),
    ],
    ids=str,
)
def test_selftest_against_any_rule(fields):
    """What the cases expect follows from the rule that is named, whatever it is."""
    rule = RedirectRule(**fields)
    with running(RedirectServer(("127.0.0.1", 0), rule=rule)) as address:
        assert [
            (what, expected, got)
            for what, expected, got in owahttps.try_cases(address, rule)
            if got not in expected.split("|")
        ] == []


def test_the_embedded_certificate_stays_on_loopback():
    """Everybody has its key: it must never serve another address."""
    for address in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(RuleError) as caught:
            owahttps.StubServer((address, 0))
        assert address in str(caught.value)


class NoCertificate(owahttps.StubServer):
    """No certificate at all: no handshake."""

    def __init__(self, *args, **fields):
        super().__init__(*args, **fields)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)


class UntrustedCertificate(owahttps.StubServer):
    """A certificate of its own, for the right name, that nobody trusts."""

    def __init__(self, *args, **fields):
        super().__init__(*args, **fields)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.TemporaryDirectory() as folder:
            pem = os.path.join(folder, "pem")
            subprocess.check_call(
                [
                    "openssl",
                    "req",
                    "-x509",
                    "-newkey",
                    "rsa:2048",
                    "-nodes",
                    "-subj",
                    "/CN=localhost",
                    "-addext",
                    "subjectAltName=DNS:localhost",
                    "-days",
                    "9",
                    "-keyout",
                    pem + "k",
                    "-out",
                    pem,
                ],
                stderr=subprocess.DEVNULL,
            )
            self.context.load_cert_chain(pem, pem + "k")


class DeadStub(owahttps.StubServer):
    def verify_request(self, request, client_address):
        return False


def sabotaged_rule(**wrong):
    return type(
        "Sabotaged",
        (RedirectRule,),
        {
            "__new__": lambda cls, *args, **fields: super(RedirectRule, cls).__new__(
                cls, *RedirectRule(*args, **dict(fields, **wrong))
            )
        },
    )


@pytest.mark.parametrize(
    "name, value, must_fail",
    [
        ("RedirectRule", sabotaged_rule(status=301), "plain HTTP is redirected"),
        ("RedirectRule", sabotaged_rule(host="evil.example"), "plain HTTP is redirected"),
        ("RedirectRule", sabotaged_rule(path="/owa"), "plain HTTP is redirected"),
        ("StubServer", NoCertificate, "the stub's page comes over verified TLS"),
        pytest.param(
            "StubServer",
            UntrustedCertificate,
            "the stub's page comes over verified TLS",
            marks=pytest.mark.skipif(
                not shutil.which("openssl"), reason="needs the openssl program"
            ),
        ),
        ("StubServer", DeadStub, "check finds nothing wrong"),
        (
            "RedirectRule.location",
            lambda self, name, target: "http://%s:%d/exchange" % (name, self.https_port),
            "plain HTTP is redirected",
        ),
        (
            "RedirectRule.location",
            lambda self, name, target: "https://" + name + target,
            "Host with a port",
        ),
        ("server_name", lambda authority: authority, "Host with '@'"),
        ("RedirectServer", None, "plain HTTP is redirected"),
    ],
    ids=[
        "status",
        "host",
        "path",
        "no certificate",
        "untrusted certificate",
        "dead stub",
        "http Location",
        "fixed path",
        "any Host",
        "no redirect",
    ],
)
def test_sabotage_turns_the_selftest_red(monkeypatch, name, value, must_fail):
    """Each part broken on purpose: a self-test that stays green proves nothing."""
    if value is None:
        value = lambda address, rule: owahttps._HTTPServer(address, owahttps.BeforeHandler)  # noqa: E731
    owner, _, attribute = name.rpartition(".")
    monkeypatch.setattr(getattr(owahttps, owner) if owner else owahttps, attribute, value)
    red = [what for what, _, _ in failing()]
    assert must_fail in red


@pytest.mark.parametrize(
    "data, request_, answers",
    [
        ("HTTP/1.1 302 Found\r\nLocation: a\r\nContent-Length: 2\r\n\r\nhi", b"GET ", "302 a"),
        (
            "HTTP/1.1 302 Found\r\nLocation: a\r\nContent-Length: 3\r\n\r\nhi",
            b"GET ",
            "302 a, cut off",
        ),
        ("HTTP/1.1 302 Found\r\nLocation: a\r\nContent-Length: 3\r\n\r\n", b"HEAD ", "302 a"),
        ("HTTP/1.1 302 Found\r\nContent-Length: x\r\n\r\nhi", b"GET ", "302"),
        ("HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\nhi", b"GET ", "302, hi"),
        ("", b"GET ", "closed"),
        (
            "HTTP/1.1 302 Found\r\nStrict-Transport-Security: x\r\n\r\n",
            b"GET ",
            "302, Strict-Transport-Security in clear",
        ),
    ],
)
def test_the_selftest_reads_what_came(data, request_, answers):
    """Whatever a server under test sends is a result, never a traceback; a torn answer is no answer."""
    assert owahttps._answers(data.encode(), request_) == answers


def test_selftest_against_asks_for_the_rules_own_health_path():
    with serving("--health", "/status") as (_, port):
        code, out, _ = run(
            "selftest", "--against", "http://127.0.0.1:%d" % port, "--health", "/status", "--quiet"
        )
        assert code == 0, out


def test_selftest_fails_by_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(
        owahttps, "try_end_to_end", lambda: iter([("a", "b|c", "d"), ("e", "f", "f")])
    )
    assert owahttps.main(["selftest", "--quiet"]) == 1
    out = capsys.readouterr().out
    assert (
        "FAIL      a: expected b|c, got d" in out
        and out.endswith("1 failed\n")
        and "ok  " not in out
    )


# ---- The text and its promises ---------------------------------------------------------------------------------------


def source():
    with open(SCRIPT, encoding="utf-8") as file:
        return file.read()


CAP = 2664


def test_size_is_a_feature():
    lines = source().splitlines()
    assert len(lines) <= CAP and max(map(len, lines)) <= 120
    with open(__file__, encoding="utf-8") as file:
        assert max(map(len, file.read().splitlines())) <= 120


def test_nothing_is_used_before_it_is_defined():
    """The file reads top to bottom: what a function or class uses stands above it."""
    defined, early = {}, []
    tree = ast.parse(source())
    for node in tree.body:
        for name in [getattr(node, "name", None)] + [
            target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)
        ]:
            defined.setdefault(name, node.lineno)
    for node in tree.body:
        for use in ast.walk(node):
            if (
                isinstance(use, ast.Name)
                and defined.get(use.id, 0) > node.lineno
                and use.id != getattr(node, "name", "")
            ):
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
    names = getattr(sys, "stdlib_module_names", None)  # since Python 3.10
    assert names is None or roots <= names
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-s", "-c", "import owahttps"],
        cwd=HERE,
        stderr=subprocess.PIPE,
    )
    assert done.returncode == 0, done.stderr.decode()  # without site-packages


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
    every = {
        command: set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", help_of(command)))
        for command in commands
    }
    everywhere = set().union(*every.values())
    others = {"--against", "--cacert", "--version", "--now"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) - others <= everywhere
    assert everywhere - {"--help"} <= set(re.findall(r"--[a-z][a-z0-9-]+", text))
    for line in re.findall(r"(?m)^\$ .*owahttps\.py (.*?)(?: *#.*| &| >.*)?$", text):
        words = line.split()
        assert {word for word in words if word.startswith("--")} <= every[words[0]], line


def test_the_readmes_demo_output_is_real():
    process = subprocess.Popen(
        [
            sys.executable,
            "owahttps.py",
            "demo",
            "--port",
            str(free_port()),
            "--https-port",
            str(free_port()),
        ],
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
    )
    printed = "".join(process.stdout.readline() for _ in range(3))
    process.terminate()
    process.communicate(timeout=10)
    assert re.sub(r":\d{4,5}", ":PORT", printed.replace(SCRIPT, "owahttps.py")) in re.sub(
        r":\d{4,5}", ":PORT", readme()
    )


def test_the_readmes_counts_are_real():
    counts = [
        sum(owahttps._applies(case[1], rule) for case in CASES)
        for rule in (
            RedirectRule(keep_path=True),
            RedirectRule(host="mail.example.com", keep_path=True),
        )
    ]
    checks = len(list(owahttps.try_ourselves()))
    assert re.findall("([0-9]+) checks, 0 failed", readme()) == [str(checks), str(counts[0])]
    assert re.findall("of ([0-9]+) that apply|17 of ([0-9]+)", readme()) == [
        (str(counts[0]), ""),
        ("", str(counts[1])),
    ]


def test_the_readmes_fail2ban_filter(tmp_path):
    """It must match a hostile request, and never the neighbour who only came to the wrong door."""
    if not find("fail2ban-regex"):
        pytest.skip("no fail2ban here")
    (tmp_path / "owahttps.conf").write_text(
        re.search(r"(?s)```ini\n(\[Definition\].*?)```", readme()).group(1)
    )
    with serving() as (process, port):
        for request in (
            get(host="a@b"),
            get(fields="X: a\0b\r\n"),
            get(fields="X-Forwarded-Proto: https\r\n"),
            "\x16\x03\x01",
        ):
            ask(port, request)
        lines = [process.stderr.readline() for _ in range(4 + (os.geteuid() == 0))]
    (tmp_path / "err.log").write_bytes(b"".join(lines))
    done = subprocess.run(
        ["fail2ban-regex", str(tmp_path / "err.log"), str(tmp_path / "owahttps.conf")],
        stdout=subprocess.PIPE,
    )
    assert b" 2 matched" in done.stdout, done.stdout.decode()


def test_the_readme_names_what_servers_do_otherwise():
    for what in DIFFERS:
        assert "| %s |" % what in readme(), what
    for line in run("generate", "--list")[1].splitlines():
        assert line in readme()


@pytest.mark.parametrize("command", ["", "serve", "generate", "check", "selftest", "demo"])
def test_help_fits_a_screen(command):
    text = help_of(command)
    assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) < 80
    assert (not command or "examples:" in text) and "==SUPPRESS==" not in text
    assert run()[1] == help_of("")


def test_version():
    assert run("--version") == (0, "owahttps %s\n" % owahttps.__version__, "")


# ---- Every box -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["-I", "-O", "-OO", "-bb", "-Werror", "-Xdev", "-S", "-B"])
def test_flags(flags):
    if flags == "-Xdev":
        flags = ["-X", "dev", "-W", "error"]
    done = subprocess.run(
        [sys.executable]
        + ([flags] if isinstance(flags, str) else flags)
        + [SCRIPT, "selftest", "--quiet"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert (done.returncode, done.stderr) == (0, b"") and b" 0 failed" in done.stdout


def test_from_anywhere(tmp_path):
    """From a folder with spaces and letters beyond ASCII, that cannot be written; from standard input; as a module; and
    nothing is left beside the file."""
    folder = tmp_path / "a b \xe9"
    folder.mkdir()
    shutil.copy(SCRIPT, str(folder))
    os.chmod(str(folder), 0o555)
    bare = {
        name: value
        for name, value in os.environ.items()
        if name in ("PATH", "SYSTEMROOT", "TEMP", "TMP")
    }
    try:
        for argv, settings in (
            ([str(folder / "owahttps.py")], dict(env=dict(bare, LANG="C", LC_ALL="C"))),
            (["owahttps.py"], dict(cwd=str(folder), env=dict(bare, LC_ALL="C"))),
            (["-B", "-m", "owahttps"], dict(cwd=str(folder))),
            (["-"], dict(input=source().encode())),
        ):
            done = subprocess.run(
                [sys.executable] + argv + ["selftest", "--quiet"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                **settings,
            )
            assert (done.returncode, done.stderr) == (0, b"") and b" 0 failed" in done.stdout
    finally:
        os.chmod(str(folder), 0o755)
    assert os.listdir(str(folder)) == ["owahttps.py"]


def test_what_differs_on_windows(monkeypatch):
    """Each difference, simulated: select()'s 512 sockets, an exclusive port, http.sys."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert owahttps._connection_cap(0) == 500
    for number in (errno.EADDRINUSE, errno.EACCES):
        assert "PID 4 is http.sys" in owahttps._bind_trouble(OSError(number, "in use"), "", 80)
    monkeypatch.setattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_KEEPALIVE, raising=False)
    with RedirectServer(("127.0.0.1", 0)) as server:
        assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    monkeypatch.delattr(os, "geteuid", raising=False)
    assert list(owahttps._warnings(RedirectRule(), "::")) == []


def test_output_that_cannot_be_written():
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [sys.executable, SCRIPT, "generate"],
                stdout=full,
                stderr=subprocess.PIPE,
                universal_newlines=True,
            )
        assert done.returncode == 1 and done.stderr == "owahttps: error: No space left on device\n"
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "generate"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(10) == 1
    process.stderr.close()


@linux
@pytest.mark.parametrize(
    "argv, code",
    [(["check", "a..b"], 3), (["serve", "--status", "999"], 2), (["serve", "--bogus"], 2)],
)
def test_exit_codes_with_a_full_disk(argv, code):
    with open("/dev/full", "wb") as full:
        assert subprocess.run([sys.executable, SCRIPT] + argv, stderr=full).returncode == code


@linux
@pytest.mark.parametrize(
    "argv, code",
    [
        (["check", "nowhere.invalid"], 3),
        (["check", "a b"], 3),
        (["generate", "nope"], 2),
        (["generate", "--part", "asp"], 0),
    ],
)
@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-"])
def test_exit_codes_with_closed_files(argv, code, closed):
    """A monitor that closes standard error must never read a crash as a verdict."""
    done = subprocess.run(
        ["sh", "-c", 'exec %s; exec "$@"' % closed, "sh", sys.executable, SCRIPT] + argv
    )
    assert done.returncode == code


def test_colour_is_for_terminals(monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert owahttps._paint("ok") == "ok"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert owahttps._paint("ok") == "\033[32mok\033[m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert owahttps._paint("ok") == "ok"


# ---- Other servers ---------------------------------------------------------------------------------------------------


def find(*names):
    return next(
        (
            path
            for path in (
                shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
                for name in names
            )
            if path
        ),
        None,
    )


# Each main file is laid out as the distribution's own is, with another site beside ours.
NGINX = """\
daemon off; worker_processes 1; pid {dir}/nginx.pid; error_log {dir}/error.log;
events {{}}
http {{
  access_log {dir}/access.log; client_body_temp_path {dir}/b; proxy_temp_path {dir}/p;
  fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  include {file};
  server {{ listen {port}; server_name beside.example; return 204; }}
}}
"""
APACHE = """\
ServerRoot {dir}
PidFile {dir}/pid
ErrorLog {dir}/error.log
DefaultRuntimeDir {dir}
ServerName plain.invalid
UseCanonicalName On
<IfFile /usr/lib/apache2/modules/mod_mpm_event.so>
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
</IfFile>
LoadModule rewrite_module /usr/lib/apache2/modules/mod_rewrite.so
LoadModule headers_module /usr/lib/apache2/modules/mod_headers.so
LoadModule setenvif_module /usr/lib/apache2/modules/mod_setenvif.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
Include {file}
<VirtualHost *:{port}>
ServerName beside.example
RewriteEngine on
RewriteRule ^ - [R=204]
</VirtualHost>
"""
CADDY = """\
{{
\tadmin off
}}
import {file}
http://beside.example:{port} {{
\trespond 204
}}
"""
# Each server: its program, its main file ("": ours), its own syntax check, how it is started.
PEERS = {
    "nginx": (("nginx",), NGINX, ["-t", "-q", "-c", "{conf}"], ["-c", "{conf}"]),
    "apache": (("apache2", "httpd"), APACHE, ["-t", "-f", "{conf}"], ["-X", "-f", "{conf}"]),
    "haproxy": (("haproxy",), "", ["-c", "-q", "-f", "{conf}"], ["-db", "-f", "{conf}"]),
    "caddy": (
        ("caddy",),
        CADDY,
        ["validate", "--adapter", "caddyfile", "--config", "{conf}"],
        ["run", "--adapter", "caddyfile", "--config", "{conf}"],
    ),
}


@contextlib.contextmanager
def peer(name, text, port, folder):
    """Run a server of the machine's own, with this recipe, on this loopback port."""
    programs, main, check, start = PEERS[name]
    program = find(*programs)
    if os.geteuid():
        text = re.sub(r"(?m)^    (user|group) haproxy\n", "", text)
    file, conf = os.path.join(folder, "owahttps.conf"), os.path.join(folder, "main.conf")
    with open(file, "w") as ours, open(conf, "w") as around:
        ours.write(text)
        around.write(main.format(dir=folder, port=port, file=file) or text)
    quiet = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "env": dict(os.environ, HOME=folder, XDG_DATA_HOME=folder, XDG_CONFIG_HOME=folder),
    }
    done = subprocess.run([program, *(word.format(conf=conf) for word in check)], **quiet)
    assert done.returncode == 0, done.stdout.decode()
    quiet["stdout"] = subprocess.DEVNULL
    process = subprocess.Popen([program, *(word.format(conf=conf) for word in start)], **quiet)
    try:
        assert wait_until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)), 15)
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


# What a recipe's server does otherwise than decided, as in the README's table: N nginx, A Apache, H HAProxy, C Caddy.
DIFFERS = {
    "unknown method": "N",
    "OPTIONS *": "NAHC",
    "Expect: 100-continue gets the final answer": "N",
    "Host in capitals": "C",
    "IPv6 Host": "C",
    "IPv6 Host that is none": "NHC",
    "Host that ends in a number, but is no IPv4 address": "NHC",
    "Host with a label of 64": "NAHC",
    "Host of 254 characters": "NAHC",
    "Host port 0": "NHC",
    "Host port 65536": "NHC",
    "Host port that is no number": "N",
    "no Host, HTTP/1.0, with a fixed host": "HC",
    "pipelined requests, answered in order": "H",
    "two Hosts, equal": "H",
    "folded field line": "AHC",
    "lone LF in the head": "NHC",
    "lone LF at every line's end": "NHC",
    "NUL in the head": "H",
    "DEL in the head": "NH",
    "field line without a colon": "N",
    "absolute form goes before Host": "H",
    "absolute form without a path": "AH",
    "absolute form with userinfo": "C",
    "absolute form, other scheme": "NHC",
    "target with a fragment": "NC",
    "HTTP/0.9": "NA",
    "HTTP/2 preface": "H",
    "HTTP/3.7": "AH",
    "TLS ClientHello": "AC",
    "one leading empty line": "C",
    "Content-Length and Transfer-Encoding": "AHC",
    "target of 9,000 bytes": "HC",
    "head of 40,000 bytes": "C",
    "path and query, byte for byte": "N",
    "outside the URL's grammar is encoded": "NAH",
    "ACME token that is none": "NAC",
    "ACME token through a symbolic link": "NAC",
}


# Requests that each recipe's server answers as serve does: target, or field of a request for /.
ALIKE = [
    *("/", "/x/y?z=%2F", "http://mail.example.com/autodiscover/a?b", "/health"),
    # Paths for machines, and what only looks like one.
    *("/autodiscover/autodiscover.xml", "/AutoDiscover/Autodiscover.XML?q=1", "/autodiscoverx"),
    *("/.well-known/mta-sts.txt", "/.Well-Known/x", "/.well-known"),
    *("/api", "/API/v1?x", "/api/", "/api?x=1", "/apix", "/v2/y/z"),
    # Tokens in either layout of a webroot, and none.
    *("/.well-known/acme-challenge/a-Token_1", "/.well-known/acme-challenge/b-Token"),
    *("/.well-known/acme-challenge/none", "/.well-known/acme-challenge/a-Token_1?x=y"),
    *("X-Forwarded-Proto: https", "X-Forwarded-Proto: wss", "X-Forwarded-Proto: http"),
    *("Front-End-Https: On", "Front-End-Https: off", "X-Forwarded-Ssl: on"),
    *("Forwarded: for=1.2.3.4;proto=https", 'Forwarded: for=_x;Proto="https";by=y'),
    *("Forwarded: for=1.2.3.4;proto=http", "CloudFront-Forwarded-Proto: https"),
    *("X-ARR-SSL: 2048|256|C=US", "Host: other.example", "Host: a@mail.example.com"),
]
# None of these may lead to another host than this one, by any server.
EVIL = [
    *(
        get(host=host)
        for host in (
            "mail.example.com@evil.example",
            "mail.example.com#.evil.example",
            "evil.example#x",
            "mail.example.com/.evil.example",
            "mail.example.com?.evil.example",
            "evil.example,x",
            "mail.example.com\\.evil.example",
            "evil.example:80@mail.example.com",
            "evil.example%00",
            "mail.example.com evil.example",
            "evil.example\tx",
            "x:evil.example",
        )
    ),
    *(
        get(target)
        for target in (
            ".evil.example",
            "@evil.example",
            ":@evil.example",
            "x:@evil.example",
            "//evil.example/",
            "/\\evil.example",
            "/.well-known/../../\\evil.example",
            "/%0d%0aLocation:evil.example",
            "http:evil.example/",
            "/autodiscover//evil.example/%0a",
        )
    ),
]
RULES = {
    "default": RedirectRule(),
    "keep-308": RedirectRule(keep_path=True, status=308),
    "fixed-301": RedirectRule(host="mail.example.com", https_port=8443, path="/owa", status=301),
    "all": RedirectRule(
        allow_hosts=("mail.example.com",),
        health="/health",
        acme_dir="/",
        api=("/api", "/v2/y"),
    ),
}


def request_of(text):
    """Return the request for a row of ALIKE."""
    if ": " not in text:
        return get(text)
    if text.startswith("Host: "):
        return get(host=text[6:])
    return get(fields=text + "\r\n")


def seen(data):
    """Return what counts of an answer: status, Location, and how long a permanent one is kept."""
    response = owahttps.read_response(data)[0]
    age = response.field("cache-control") if response.status in (301, 308) else None
    return response.status, response.field("location"), age


@pytest.fixture
def tokens():
    """A folder that the servers' own users can read, with a token in each layout, and a link."""
    with tempfile.TemporaryDirectory() as folder:
        webroot = os.path.join(folder, ".well-known", "acme-challenge")
        os.makedirs(webroot)
        os.chmod(folder, 0o755)
        for path in os.path.join(folder, "a-Token_1"), os.path.join(webroot, "b-Token"):
            with open(path, "w") as file:
                file.write("TOKEN.thumbprint")
        os.symlink(os.path.join(folder, "a-Token_1"), os.path.join(folder, "link"))
        yield folder


@pytest.mark.parametrize("rule", list(RULES.values()), ids=list(RULES))
@pytest.mark.parametrize("name", list(PEERS))
def test_servers(name, rule, tmp_path, tokens):
    """Each recipe's server answers as serve does, and never redirects to another host."""
    if not find(*PEERS[name][0]):
        pytest.skip(f"no {name} here")
    rule = rule._replace(acme_dir=tokens if rule.acme_dir and name != "haproxy" else "")
    port = free_port()
    with peer(name, owahttps.server_recipe(name, rule, port)[0].text, port, str(tmp_path)):
        for text in ALIKE:
            request = request_of(text)
            serve = owahttps.answer(
                request.encode(), rule, "", lambda token: owahttps.read_token(tokens, token)
            )
            assert seen(ask(port, request)) == seen(serve.response), text
        for request in EVIL:
            location = seen(ask(port, request))[1]
            assert not location or urlsplit(location).netloc.startswith("mail.example.com"), request
        if name != "haproxy":
            assert seen(ask(port, get(host="beside.example"))) == (204, None, None)
        assert (
            failures(port, rule)
            - {what for what, servers in DIFFERS.items() if name[0].upper() in servers}
            == set()
        )


# ---- Real clients ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def demo(*argv):
    """`owahttps.py demo` on free ports: its URL."""
    process = subprocess.Popen(
        [
            sys.executable,
            SCRIPT,
            "demo",
            "--port",
            str(free_port()),
            "--https-port",
            str(free_port()),
        ]
        + list(argv),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process.stdout.readline().split()[0].decode()
    finally:
        process.terminate()
        assert process.wait(5) == 0 or os.name == "nt"
        process.stdout.close()


def test_curl_follows_to_the_stub():
    """The embedded certificate is a trust anchor by the file's own name; --http1.0 without Host gets an answer too."""
    if not find("curl"):
        pytest.skip("no curl here")
    with demo() as url:
        done = subprocess.run(["curl", "-4siL", "--cacert", SCRIPT, url], stdout=subprocess.PIPE)
        assert (
            done.returncode == 0
            and b"302 Found" in done.stdout
            and b"You are on HTTPS" in done.stdout
        )
        done = subprocess.run(["curl", "-4si0", "-H", "Host:", url], stdout=subprocess.PIPE)
        assert done.returncode == 0 and b"HTTP/1.1 400 Bad Request" in done.stdout
    with demo("--before") as url:
        assert (
            b"HTTP 403.4 - Forbidden: SSL required"
            in subprocess.run(["curl", "-4si", url], stdout=subprocess.PIPE).stdout
        )


def test_the_demo_tells_what_happened():
    """Its page must never tell of a redirect that was none, nor of another address than the one that was asked for."""
    trust = ssl.create_default_context(cadata=owahttps.STUB_CERTIFICATE)

    def page(url):
        url = owahttps.parse_url(url)
        return owahttps.fetch(
            url,
            (url.name, url.port),
            trust if url.scheme == "https" else None,
            "%s:%d" % (url.name, url.port),
            5,
        )

    with demo() as url:
        url = url.replace("localhost", "127.0.0.1")
        secure = page(url + "mail?x").location
        told = page(secure).body
        assert (
            "You typed" in told and url + "mail?x<" in told and "Location: " + secure + "<" in told
        )
        told = page(secure).body
        assert "You typed" not in told and "302" not in told and "straight" in told
    with demo("--before") as url:
        secure = re.findall(
            "<code>(https://localhost:[0-9]+/exchange)<",
            page(url.replace("localhost", "127.0.0.1")).body,
        )[0]
        assert "302" not in page(secure.replace("localhost", "127.0.0.1")).body


@pytest.mark.parametrize(
    "argv, shows",
    [
        ([], ["You are on HTTPS", "HTTP/1.1 302 Found", "/exchange</code>", "TLSv1.3"]),
        (["--before"], ["HTTP 403.4 - Forbidden: SSL required"]),
    ],
)
def test_chromium_ends_on_the_page(argv, shows, tmp_path):
    chromium = find("chromium", "chromium-browser", "google-chrome")
    if not chromium:
        pytest.skip("no chromium here")
    with demo(*argv) as url:
        done = subprocess.run(
            [
                chromium,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-sync",
                "--disable-background-networking",
                "--disable-component-update",
                "--ignore-certificate-errors",
                "--user-data-dir=" + str(tmp_path),
                "--dump-dom",
                url + "mail?x=%22%3E",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=60,
        )
    for text in shows + (["/mail?x=%22%3E</code>"] if not argv else []):
        assert text in done.stdout.decode()
