# /// script
# requires-python = ">=3.6"
# dependencies = ["pytest"]
# ///
"""Tests of owahttps.py: tables of cases, real sockets on port 0, no network, no root.

python3 -m pytest                     everything that this machine has the programs for
python3 -m pytest -k "not servers"    without nginx, Apache, HAProxy and Caddy
"""

import ast
import contextlib
import errno
import faulthandler
import http.client
import io
import json
import os
import random
import re
import select
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
from http.server import HTTPServer
from typing import Any, NamedTuple
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
DATE = "Sun, 06 Nov 1994 08:49:37 GMT"
KEEP = b"GET /%d HTTP/1.1\r\nHost: mail.example.com\r\n\r\n"
ONCE = b"GET /once HTTP/1.1\r\nHost: mail.example.com\r\nConnection: close\r\n\r\n"
linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs Linux: sh, ulimit, signals, /dev/full"
)


@pytest.fixture(autouse=True)
def nothing_hangs():
    """A test that hangs says where, and ends the run."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def find(*names):
    """Return the first of these programs that this machine has, or None."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return next(filter(None, (shutil.which(name, path=path) for name in names)), None)


def needs(program):
    return pytest.mark.skipif(not find(program), reason=f"needs {program}")


def run(*argv):
    """Run a command in this process: (exit code, standard output, standard error)."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                code = owahttps.main(list(argv))
            except SystemExit as end:
                code = end.code
    return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def process(*argv, shell="", **settings):
    """Run a command as a process of its own, after these words of a shell."""
    words = [sys.executable, SCRIPT, *argv]
    if shell:
        words = ["sh", "-c", shell + ' exec "$@"', "sh", *words]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    child = subprocess.Popen(words, **settings)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
        for stream in (child.stdout, child.stderr):
            if stream:
                stream.close()


def free_port():
    """Return a port that is free now, outside the range from which the system takes its own."""
    while True:
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", random.randrange(20000, 30000)))
            return sock.getsockname()[1]


@contextlib.contextmanager
def serving(*argv, **settings):
    """Run `serve` as a process, on a free loopback port: (process, address)."""
    address = "127.0.0.1", free_port()
    where = ["--bind", address[0], "--port", str(address[1])]
    with process("serve", *where, *argv, **settings) as child:

        def listens():
            with socket.socket() as sock:
                return child.poll() is not None or sock.connect_ex(address) == 0

        assert wait_until(listens) and child.poll() is None, child.communicate()
        yield child, address


def wait_until(true, seconds=10.0):
    """Poll until true() is; return what it gave last."""
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.005)
    return true()


def connect(address, data=b""):
    sock = socket.create_connection(address, 10)
    sock.sendall(data)
    return sock


def read_all(sock):
    """Return what comes until the other side closes; an error is written into it."""
    data = b""
    try:
        while True:
            piece = sock.recv(65536)
            if not piece:
                return data
            data += piece
    except OSError as error:
        return data + f"({type(error).__name__})".encode()


def ask(address, data=ONCE):
    """Return all that comes back for these bytes, until the server closes."""
    with contextlib.closing(connect(address, data)) as sock:
        return read_all(sock)


def get(target="/", host="mail.example.com", fields="", line="GET {} HTTP/1.1"):
    head = f"{line.format(target)}\r\nHost: {host}\r\n{fields}Connection: close\r\n\r\n"
    return head.encode("latin-1")


def statuses(answers):
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", answers)]


def is_whole(answer, status=302):
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"\r\nContent-Length: ([0-9]+)", head)
    return statuses(head) == [status] and length and int(length.group(1)) == len(body)


# ---- The rule ------------------------------------------------------------------------

NAMES = {
    "mail.example.com": "mail.example.com",
    "MAIL.Example.com:8080": "mail.example.com",
    "a.:80": "a",
    "a:": "a",
    "[::1]:": "[::1]",
    "[::01]": "[::01]",
    "[2001:DB8::1]:65535": "[2001:db8::1]",
    "[::ffff:192.0.2.1]": "[::ffff:192.0.2.1]",
    "192.0.2.1:80": "192.0.2.1",
    "a_b-c.d": "a_b-c.d",
    "1a.2b": "1a.2b",
    "0x.example": "0x.example",
    "1.2.3.4.example:1": "1.2.3.4.example",
    "a" * 63 + ".b": "a" * 63 + ".b",
    "a." * 126 + "a": "a." * 126 + "a",
}
NOT_NAMES = """. .. a.. a..b .a -a a- _a : :80 a:: a:0 a:00 a:65536 a:123456 a:b a:80:80 a@b u:p@a
    a#b a?b a/b a\\b a,b a%b a%20b "a" 'a' <a> a;b a|b {a} $a * *.a \xe9 b\xfccher.example \u212a
    \u0661.example a\0 a\x7f ::1 [::1 ::1] [::1]a [::1]. [] [a] [::g] [1::2::3] [fe80::1%eth0]
    [fe80::1%25eth0] [::ffff:01.2.3.4] [::1.2.3.04] [::ffff:1.2.3.256] 0x7f.1 [v1.a] 256 1.2.3
    1.2.3.4.5 256.1.1.1 01.2.3.4 1.2.3.0x4 a.0x 127.1 1.2.3.04""".split(" ")
NOT_NAMES = [text.strip("\n") for text in NOT_NAMES if text.strip("\n")]
NOT_NAMES += ["", "a b", "a\t", "a\n", "\na", "a" * 64, "a." * 127 + "a"]


def test_server_names():
    assert {text: server_name(text) for text in NAMES} == NAMES
    assert owahttps.split_authority("[::1]:80") == ("[::1]", 80)
    assert owahttps.split_authority("a.") == owahttps.split_authority("a:") == ("a", 0)


@pytest.mark.parametrize("text", NOT_NAMES, ids=ascii)
def test_what_is_not_a_server_name(text):
    with pytest.raises(HostError) as caught:
        server_name(text)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


INVALID_RULES = [
    ({"path": "exchange"}, "path 'exchange'"),
    ({"path": ""}, "path ''"),
    ({"path": "/a b"}, "path '/a b'"),
    ({"path": "/%20"}, "path"),
    ({"path": "/a?b"}, "path"),
    ({"path": "/a\n"}, "path"),
    ({"path": '/"'}, "path"),
    ({"path": "/\xe9"}, "path '/\\xe9'"),
    ({"path": None}, "path None is not text"),
    ({"host": "a b"}, "'a b'"),
    ({"host": "https://a"}, "'https://a'"),
    ({"host": "a:443"}, "port"),
    ({"host": "[::1]:443"}, "port"),
    ({"allow_hosts": ("a", "b:80")}, "'b:80'"),
    ({"allow_hosts": ("a@b",)}, "'a@b'"),
    ({"allow_hosts": ("",)}, "''"),
    ({"allow_hosts": "abc"}, "allow_hosts 'abc' is not a list"),
    ({"allow_hosts": (1,)}, "1 is not text"),
    ({"status": 303}, "303"),
    ({"status": "302"}, "status '302' is not a whole number"),
    ({"https_port": 0}, "0"),
    ({"https_port": 65536}, "65536"),
    ({"https_port": True}, "True"),
    ({"health": "health"}, "'health'"),
    ({"health": "/"}, "health"),
    ({"health": "/exchange"}, "health"),
    ({"api": ("/",)}, "nothing to redirect"),
    ({"api": ("//",)}, "'//'"),
    ({"health": None}, "health None is not text"),
    ({"api": ("a",)}, "api 'a'"),
    ({"api": "/a"}, "api '/a' is not a list"),
    ({"acme_dir": 5}, "acme_dir 5"),
    ({"api": ("/a//b",)}, "'//'"),
    ({"health": "/a//b"}, "'//'"),
]


@pytest.mark.parametrize("fields, says", INVALID_RULES, ids=str)
def test_invalid_rules(fields, says):
    for make in (RedirectRule, RedirectRule()._replace):
        with pytest.raises(RuleError) as caught:
            make(**fields)
        assert says in str(caught.value) and "\n" not in str(caught.value)


# cmd.exe, PowerShell, VBScript and every server's configuration: none can be broken out of.
HOSTILE = (
    r"""a"b a%>b a%b %PATH% a&calc a|b a>b a^b a'b a`b a$(b) a;b a!b a{b} <% $host a\b""".split()
)


@pytest.mark.parametrize("value", [*HOSTILE, "a\nb", "a b"], ids=ascii)
def test_hostile_values_make_no_rule(value):
    path = "/" + value
    for fields in ({"host": value}, {"path": path}, {"health": path}, {"api": (path,)}):
        with pytest.raises(RuleError):
            RedirectRule(**fields)


KEEPS = {"keep_path": True}
LOCATIONS = [
    ({}, "a", "/x?y", "https://a/exchange"),
    ({"path": "/owa"}, "[::1]", "/", "https://[::1]/owa"),
    ({"host": "B.example."}, "a", "/", "https://b.example/exchange"),
    ({"https_port": 8443}, "a", "/", "https://a:8443/exchange"),
    ({"https_port": 8443, "host": "[::1]"}, "a", "/", "https://[::1]:8443/exchange"),
    ({"https_port": 65535}, "a", "/", "https://a:65535/exchange"),
    (KEEPS, "a", "/x?y&z=/", "https://a/x?y&z=/"),
    (KEEPS, "a", "//b/x", "https://a//b/x"),
    (KEEPS, "a", "/%0d%0a%2f%C3%A9/../?", "https://a/%0d%0a%2f%C3%A9/../?"),
    (KEEPS, "a", "/%zz%", "https://a/%25zz%25"),
    (KEEPS, "a", '/\\"<>^`{|}[]\xe9', "https://a/%5C%22%3C%3E%5E%60%7B%7C%7D%5B%5D%E9"),
    ({}, "a", "/.well-known/acme-challenge/t", "https://a/.well-known/acme-challenge/t"),
    ({}, "a", "/.Well-Known/x?y", "https://a/.Well-Known/x?y"),
    ({}, "a", "/AutoDiscover/autodiscover.xml", "https://a/AutoDiscover/autodiscover.xml"),
    ({}, "a", "/.well-known", "https://a/exchange"),
    ({}, "a", "/x/.well-known/y", "https://a/exchange"),
    ({}, "a", "/autodiscover.xml", "https://a/exchange"),
]


@pytest.mark.parametrize("fields, name, target, location", LOCATIONS, ids=str)
def test_locations(fields, name, target, location):
    assert RedirectRule(**fields).location(name, target) == location


def test_a_rule_made_again_is_the_same():
    rule = RedirectRule(host="A.example", allow_hosts=["b.example", "b.example."], api=["/V1/"])
    assert rule.allow_hosts == {"a.example", "b.example"} and rule.api == ("/v1",)
    assert RedirectRule(*rule) == rule._replace() == rule
    with pytest.raises(AttributeError):
        rule.host = "b"


def test_doctests():
    import doctest

    results = doctest.testmod(owahttps)
    assert results.attempted >= 2 and results.failed == 0


# ---- The answer ----------------------------------------------------------------------


def reply(head, rule=None, **settings):
    """Return the Answer to a head in latin-1."""
    return owahttps.answer(head.encode("latin-1"), rule or RedirectRule(), DATE, **settings)


def test_the_answer_to_the_byte():
    result = reply("GET /x HTTP/1.1\r\nHost: a-b.example\r\n\r\n")
    body = (
        "<!DOCTYPE html>\n<title>Object moved</title>\n<h1>Object moved</h1>\n"
        '<p>This object may be found <a href="https://a-b.example/exchange">here</a>.\n'
    )
    assert result.response.decode() == (
        f"HTTP/1.1 302 Found\r\nDate: {DATE}\r\nServer: owahttps\r\n"
        "Location: https://a-b.example/exchange\r\nContent-Type: text/html; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    )
    log = f'"GET /x HTTP/1.1" 302 {len(body)} "-" "-"'
    location = "https://a-b.example/exchange"
    assert result[1:] == (302, location, "/x", False, False, log, "")


ALLOW = "Allow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS\r\n"
ANSWERS = [  # request line, further fields, status, what the answer has
    ("HEAD / HTTP/1.1", "Host: a", 302, "Content-Length: 1"),
    ("OPTIONS * HTTP/1.1", "Host: a", 204, f"Server: owahttps\r\n{ALLOW}\r\n"),
    ("TRACE / HTTP/1.1", "Host: a", 405, ALLOW),
    ("GET / HTTP/1.0", "Host: a", 302, "Connection: close"),
    ("GET / HTTP/1.1", "hOST:a \t", 302, "https://a/"),
    ("GET / HTTP/1.1", "Host: a\r\nContent-Length: 5, 5", 400, "Content-Length"),
    ("GET http://a?b HTTP/1.1", "Host: x", 302, "https://a/?b\r\n"),
    ("GET HTTP://A:1/ HTTP/1.1", "Host: x", 302, "https://a/\r\n"),
    ("GET http:///x HTTP/1.1", "Host: x", 400, "not one valid server name"),
    ("GET http://a/ HTTP/1.1", "Host: ", 400, "not one valid server name"),
    ("GET /\xe9 HTTP/1.1", "Host: a", 302, "https://a/%E9\r\n"),
    ("GET /'&<a HTTP/1.1", "Host: a", 302, '&#x27;&amp;%3Ca"'),
    ("HEAD / HTTP/1.1", "bad", 400, "Content-Length: 9"),
    ("\r\nHEAD / HTTP/2.0", "Host: a", 505, "Content-Length: 1"),
    ("M" * 50 + " / HTTP/1.1", "Host: a", 302, "https://a/"),
    ("M" * 51 + " / HTTP/1.1", "Host: a", 400, "malformed request line"),
    ("M" * 9000 + " / HTTP/1.1", "Host: a", 400, "malformed request line"),
    ("PROXY TCP4 192.0.2.1 192.0.2.2 1 80", "Host: a", 400, "PROXY protocol"),
    ("GET /a HTTP/1.1", "Host: a", 302, "/a\r\n"),
    ("GET /health HTTP/1.1", "Host: a", 200, "OK\n"),
    ("OPTIONS /health HTTP/1.1", "Host: a", 200, "OK\n"),
    ("GET /healthy HTTP/1.1", "Host: a", 302, "/healthy\r\n"),
    ("POST /health HTTP/1.1", "Host: a", 302, "/health\r\n"),
    ("OPTIONS ! HTTP/1.1", "Host: a", 400, "not a path"),
    ("GET /api HTTP/1.1", "Host: a", 403, "HTTPS"),
    ("DELETE /Api/x?y HTTP/1.1", "Host: a", 403, "HTTPS"),
    ("GET /apis HTTP/1.1", "Host: a", 302, "/apis\r\n"),
    ("GET /" + "a" * 8191 + " HTTP/1.1", "Host: a", 302, "aaa\r\n"),
    ("GET /" + "a" * 8192 + " HTTP/1.1", "Host: a", 414, "too long"),
    ("GET / HTTP/1.1", "Host: a\r\nX: " + "a" * 32736, 302, "https://a/"),
    ("GET / HTTP/1.1", "Host: a\r\nX: " + "a" * 32737, 431, "too long"),
]


@pytest.mark.parametrize("line, fields, status, has", ANSWERS, ids=lambda value: str(value)[:40])
def test_answers(line, fields, status, has):
    rule = RedirectRule(keep_path=True, health="/health", api=("/api",))
    result = reply(f"{line}\r\n{fields}\r\n\r\n", rule)
    response = result.response.decode("latin-1")
    assert response.startswith(f"HTTP/1.1 {status} ") and has in response
    assert response.endswith("\r\n\r\n") == (line.strip()[:4] == "HEAD" or status == 204)


LOOPS = [
    ("X-Forwarded-Proto: HTTPS, http", 421),
    ("X-Forwarded-Proto: wss", 421),
    ("X-Forwarded-Proto: http", 302),
    ("X-Forwarded-Proto: httpsx", 302),
    ("Front-End-Https: off", 302),
    ("Forwarded: for=192.0.2.1;proto=https;by=x, proto=http", 421),
    ('Forwarded: Proto="HTTPS"', 421),
    ("Forwarded: proto=http, proto=https", 302),
    ("X-ARR-SSL: ", 302),
]


@pytest.mark.parametrize("field, status", LOOPS)
def test_loop_signs(field, status):
    """What a proxy that has ended TLS sends is not redirected: it would come back for ever."""
    assert reply(f"GET / HTTP/1.1\r\nHost: a\r\n{field}\r\n\r\n").status == status


STATUS_LINES = {301: b"301 Moved Permanently", 302: b"302 Found"}
STATUS_LINES.update({307: b"307 Temporary Redirect", 308: b"308 Permanent Redirect"})


@pytest.mark.parametrize("status", STATUS_LINES)
def test_statuses(status):
    response = reply("GET / HTTP/1.1\r\nHost: a\r\n\r\n", RedirectRule(status=status)).response
    assert response.startswith(b"HTTP/1.1 %s\r\n" % STATUS_LINES[status])


def test_acme_tokens():
    rule = RedirectRule(acme_dir="/tokens")
    for path, status in (("tok_En-1", 200), ("other", 404), ("../tok_En-1", 404), ("", 404)):
        head = f"GET {owahttps.ACME_PREFIX}{path} HTTP/1.1\r\nHost: a\r\n\r\n"
        result = reply(head, rule, find_token={"tok_En-1": b"abc\xe9"}.get)
        assert result.status == status
        assert result.response.endswith(b"\r\n\r\n" + (b"abc\xe9" if status == 200 else b""))


BEGUN = {
    False: ["", "G", "GET / HTTP/1.1\r", "GET / HTTP/1.1\r\n", "\r\n", "\r\nGET", "\r\n\r", "PROX"]
    + ["GET / HTTP/1.1\r\nHost: a\r\n", "GET / HTTP/1.1\r\nX: " + "x" * 32700, "G" * 8192],
    True: ["GET /\r\n", "GET / HTTP/1.1\n", "GET / HTTP/1.1\r\nHost: a\n", "\n", "\x16", "x" * 8300]
    + ["GET / HTTP/1.1\r\nX: " + "x" * 32768, "GET / HTTP/2.0\r\n", "PROXY TCP4 a b\r\n"],
}


@pytest.mark.parametrize("hopeless", BEGUN)
def test_heads_that_have_begun(hopeless):
    """A head is refused as soon as it can never be right, wherever its packets end."""
    for text in BEGUN[hopeless]:
        assert owahttps.is_refused_early(text.encode()) == hopeless, text[:40]
        if hopeless:
            assert reply(text).refusal and reply(text).close


LOGGED = [
    ('/a"b', 'x" 200 0 "', "\x1b[31m", '"GET /a\\x22b HTTP/1.1" 302 {} "x\\x22 200 0 \\x22" '),
    ("/\xe9\\", "\xff\t", "ok", '"GET /\\xE9\\x5C HTTP/1.1" 302 {} "\\xFF" "ok"'),
    ("/" + "a" * 2000, "b" * 2000, "c" * 2000, f'"GET /{"a" * 995}" 302 {{}} "{"b" * 1000}" "'),
]


@pytest.mark.parametrize("target, referer, agent, log", LOGGED, ids=range(3))
def test_log_lines_cannot_be_forged(target, referer, agent, log):
    """No byte of a request may end a quoted part, begin a line, or reach a terminal raw."""
    fields = f"Host: a\r\nReferer: {referer}\r\nUser-Agent: {agent}"
    result = reply(f"GET {target} HTTP/1.1\r\n{fields}\r\n\r\n")
    assert re.fullmatch(r'"[ !#-~]*" \d{3} \d+ "[ !#-~]*" "[ !#-~]*"', result.log)
    size = result.response.count(b"") - result.response.index(b"\r\n\r\n") - 5
    assert result.refusal or result.log.startswith(log.format(size))


PIECES = r"""GET|POST| | |/|/x|//|http://|a|good.example|evil|@|#|?|\|:|:80|[::1]|%0d%0a|%||..
    """.strip().split("|")
PIECES += ["\r\n", "\r\n", "\r", "\n", "\t", "\0", "\x7f", "\xe9", ".", ",", '"', "<"]
PIECES += [" HTTP/1.1\r\nHost: ", " HTTP/1.0\r\n", "\r\nHost: ", "X: y\r\n"]


def test_random_heads_never_break_a_location():
    """Whatever comes, a Location names the host that was asked for, in a URL of the grammar."""
    rnd = random.Random(279681)
    redirected = 0
    for _ in range(15000):
        count = rnd.randrange(1, 16)
        text = "".join(rnd.choice(PIECES) for _ in range(count))
        if rnd.random() < 0.5:
            text = f"GET /{text[:9]} HTTP/1.1\r\nHost: good.example{text[9:18]}"
        head = text.partition("\r\n\r\n")[0] + "\r\n\r\n"
        for rule in (RedirectRule(), RedirectRule(keep_path=True)):
            result = reply(head, rule)
            if not result.location:
                assert result.refusal or result.status in (200, 204)
                continue
            redirected += 1
            url = urlsplit(result.location)
            asked = re.search(r"(?i)^[^ ]+ https?://([^/?#]*)", head.lstrip())
            asked = asked or re.search(r"(?i)\r\nhost:[ \t]*([^\r\t ]*)", head)
            assert (url.scheme, url.netloc) == ("https", server_name(asked.group(1)))
            url_characters = r"(?:[A-Za-z0-9._~:/?@!$&'()*+,;=\[\]-]|%[0-9A-Fa-f]{2})+"
            assert re.fullmatch(url_characters, result.location)
    assert redirected > 1000


def fill(unit, end="\r\n", start="GET / HTTP/1.1\r\nHost: mail.example.com\r\n"):
    """Return a head of just 32 KB that repeats this."""
    return start + unit * ((owahttps.MAX_HEAD - len(start) - len(end)) // len(unit)) + end


LONG_HEADS = [
    *map(fill, ("a:\r\n", "Host:\r\n", "Referer:\xff\r\n", "X-Forwarded-Proto:,\r\n", "a", "\0")),
    *(fill(unit, "\x01\r\n\r\n") for unit in ("a:\r\n", "Host:\r\n", "a: x", "Forwarded: ,;")),
    *(fill(unit, "\r\n\r\n", "GET / HTTP/1.1\r\nUser-Agent: ") for unit in ("\xff", " \t", '"')),
    *(fill(unit, "!\r\n\r\n", "GET / HTTP/1.1\r\nHost: ") for unit in ("a.", "aa-.", "1.", "[0:")),
    *(f"GET {unit * (8190 // len(unit))} HTTP/1.1\r\nHost: a\r\n\r\n" for unit in ("/\xff", "/%")),
    "GET http://" + "a." * 4000 + " HTTP/1.1\r\nHost: a\r\n\r\n",
    *(unit * (32768 // len(unit)) for unit in ("\r", "\n", "\0", "\r\r\n", "A")),
    "GET / HTTP/1.1\r\nContent-Length: " + "9" * 32000 + "\r\n\r\n",
]


@pytest.mark.parametrize("head", LONG_HEADS, ids=lambda head: ascii(head[:30] + head[-9:]))
def test_no_head_takes_long_or_much(head):
    """32 KB must never cost more than milliseconds, nor a log line of more than some KB."""
    rule, seconds = RedirectRule(keep_path=True), []
    for _ in range(3):
        start = time.perf_counter()
        result = reply(head, rule)
        owahttps.is_refused_early(head.encode("latin-1"))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1 and len(result.log) < 3 * owahttps.MAX_LOGGED + 50


def test_what_visitors_share_is_bounded():
    for number in range(3000):
        reply(f"GET / HTTP/1.1\r\nHost: h{number}.example.com\r\n\r\n")
    for shared in (owahttps.server_name, owahttps.shared_render, owahttps.dates):
        info = shared.cache_info()
        assert info.currsize <= info.maxsize <= 1024


# ---- The log -------------------------------------------------------------------------


class Pipe:
    """A Log on a pipe, and what it told."""

    def __enter__(self):
        self.reader, self.writer = os.pipe()
        self.told = []
        self.log = owahttps.Log(self.writer, self.told.append)
        return self

    def __exit__(self, *_):
        for fd in (self.reader, self.writer):
            with contextlib.suppress(OSError):
                os.close(fd)

    def lost(self):
        return sum(int(text.split()[0]) for text in self.told if text.endswith("log were lost"))


@linux
def test_a_log_whose_reader_stalls():
    """flush() must never wait; each line is either read whole, in order, or counted as lost."""
    with Pipe() as pipe:
        for number in range(40000):
            pipe.log.write(f"line {number} {'x' * 40}\n")
            if number % 100 == 0:
                pipe.log.flush()
        assert len(pipe.log.waiting) <= pipe.log.max_waiting
        data = b""
        while pipe.log.waiting:
            data += os.read(pipe.reader, 65536)
            pipe.log.flush()
        pipe.log.write("last\n")
        pipe.log.close()
        os.close(pipe.writer)
        data += b"".join(iter(lambda: os.read(pipe.reader, 65536), b""))
        lines = data.decode().split("\n")
        assert lines[-2:] == ["last", ""]
        numbers = [int(re.match("line ([0-9]+) x{40}$", line).group(1)) for line in lines[:-2]]
        assert numbers == sorted(numbers) and len(numbers) + pipe.lost() == 40000
        assert pipe.lost() > 0


@linux
def test_a_log_whose_reader_stalls_to_the_end():
    """close() must never wait for it, and what was under way counts as lost."""
    with Pipe() as pipe:
        for _ in range(4000):
            pipe.log.write("x" * 99 + "\n")
        start = time.monotonic()
        pipe.log.close()
        assert time.monotonic() - start < 3 and 4000 - 700 < pipe.lost() < 4000


@linux
def test_a_log_whose_disk_is_full(tmp_path):
    """Lines that a full disk loses are counted; none is glued to one that comes later."""
    told, room = [], [10**9]
    write = os.write

    def limited(fd, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(fd, data[: room[0]])
        room[0] -= count
        return count

    with open(str(tmp_path / "log"), "wb") as file:
        log = owahttps.Log(file.fileno(), told.append)
        os.write = limited
        try:
            for lines, free in ((["a" * 9] * 3, 25), (["b"], 0), (["after"], 10**9)):
                room[0] = free
                for line in lines:
                    log.write(line + "\n")
                log.flush()
        finally:
            os.write = write
    text = (tmp_path / "log").read_text()
    assert text == "a" * 9 + "\n" + "a" * 9 + "\n" + "a" * 5 + "\nafter\n"
    assert "No space left" in told[0] and told[1:] == ["2 lines of the log were lost"]


@linux
def test_a_terminal_that_is_stopped():
    """Ctrl-S must never stop the redirect, and Ctrl-Q must bring what was written meanwhile."""
    import pty

    ours, theirs = pty.openpty()
    with serving(stdout=theirs, stderr=subprocess.DEVNULL) as (_, address):
        assert is_whole(ask(address)) and select.select([ours], [], [], 5)[0]
        os.write(ours, b"\x13")
        assert all(is_whole(ask(address)) for _ in range(1500))
        os.write(ours, b"\x11")
        data = b""
        while data.count(b"\n") < 1501 and select.select([ours], [], [], 5)[0]:
            data += os.read(ours, 65536)
        assert data.count(b'"GET /once HTTP/1.1" 302') == 1501
    os.close(ours)
    os.close(theirs)


@linux
def test_no_line_is_lost_in_a_flood(tmp_path):
    """Whatever floods, a healthy disk must get each answer's line, in order, at once."""
    log = tmp_path / "access.log"
    with log.open("wb") as file, serving(stdout=file, stderr=subprocess.DEVNULL) as (_, address):
        flood = b"".join(KEEP % number for number in range(400))
        socks = [connect(address, flood) for _ in range(30)]
        for sock in socks:
            sock.sendall(ONCE)
        assert all(len(statuses(read_all(sock))) == 401 for sock in socks)
        assert wait_until(lambda: log.read_bytes().count(b"\n") == 30 * 401, 0.5)
        for sock in socks:
            sock.close()


# ---- The listener --------------------------------------------------------------------


class Lines(list):
    """A log that a test can read."""

    write = list.append

    def flush(self):
        pass


class Quick(RedirectHandler):
    head_seconds, idle_seconds, drain_seconds = 1.0, 1.0, 0.3


class StockServer(socketserver.ThreadingMixIn, HTTPServer):
    """What http.server calls ThreadingHTTPServer since Python 3.7."""

    daemon_threads = True


@contextlib.contextmanager
def listening(handler=RedirectHandler, server=RedirectServer, **options):
    options = {"rule": RedirectRule(keep_path=True), **options}
    logs = {"access_log": Lines(), "error_log": Lines()}
    with server(("127.0.0.1", 0), handler, **logs, **options) as listener:
        loop = {"poll_interval": 0.005}
        thread = threading.Thread(target=listener.serve_forever, kwargs=loop, daemon=True)
        thread.start()
        listener.address = listener.server_address[:2]
        try:
            yield listener
        finally:
            listener.shutdown()
            thread.join(5)
    assert not thread.is_alive()


def closed(socks):
    """Return those of these sockets whose other side has closed, or sent something."""
    if not hasattr(select, "poll"):
        return select.select(socks, [], [], 0)[0]
    poll = select.poll()  # select() takes only file descriptors below 1024
    for sock in socks:
        poll.register(sock, select.POLLIN)
    return poll.poll(0)


def open_count(server):
    return len(server.connections)


COMBINED = (
    r"127\.0\.0\.1 - - \[\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\] "
    r'"GET /x HTTP/1\.1" 302 \d+ "http://r/" "agent"\n'
)


def test_serve_tells_where_and_logs_in_combined_format():
    with serving("--path", "/owa") as (child, address):
        fields = "Referer: http://r/\r\nUser-Agent: agent\r\n"
        answer = ask(address, get("/x", fields=fields))
        assert b"Location: https://mail.example.com/owa\r\n" in answer
        assert re.fullmatch(COMBINED, child.stdout.readline().decode())
        assert is_whole(ask(address, get(host="a@b")), 400)
        lines = iter(lambda: child.stderr.readline().decode(), "")
        start = f"owahttps: listening on 127.0.0.1:{address[1]}; http://HOST/ goes to "
        assert next(lines) == f"{start}https://HOST/owa (302)\n"
        refused = next(line for line in lines if "warning" not in line)
        assert re.fullmatch(rf"\[.*\] owahttps: 127.0.0.1 refused: {owahttps.NO_NAME}\n", refused)


def test_every_address_in_one_socket():
    """The default answers IPv4 and, where there is any, IPv6; an IPv4 client looks like one."""
    with listening() as unused, RedirectServer(("", 0), access_log=Lines()) as server:
        assert unused.address
        with running(server) as (_, port):
            assert is_whole(ask(("127.0.0.1", port), get()))
            with contextlib.suppress(OSError), socket.create_connection(("::1", port), 5) as sock:
                sock.sendall(get(host="[::1]:80"))
                assert b"Location: https://[::1]/exchange" in sock.recv(65536)
    assert server.access_log[0].startswith("127.0.0.1 - - [")


def test_bind_to_a_star_is_every_address():
    with process("serve", "--bind", "*", "--port", "0") as child:
        line = child.stderr.readline().decode()
        port = int(re.search(r":(\d+);", line).group(1))
        assert is_whole(ask(("127.0.0.1", port), get()))


def test_whose_rule_it_is():
    """The one that is given, else that of the server's class, else that of the handler's."""

    class Handler(RedirectHandler):
        rule = RedirectRule(path="/handler")

    class Server(RedirectServer):
        rule = RedirectRule(path="/class")

    for server, rule, path in (
        (RedirectServer, None, b"/handler"),
        (Server, None, b"/class"),
        (Server, RedirectRule(path="/given"), b"/given"),
    ):
        with listening(Handler, server, rule=rule) as listener:
            assert path + b"\r\n" in ask(listener.address, get())


@pytest.mark.parametrize("count", (1, 7, 8, 9, 16, 100))
def test_pipelined_requests_are_answered_in_order(count):
    """No pipelined request may be lost, doubled or overtaken, wherever it is others' turn."""
    with listening() as server:
        flood = b"".join(KEEP % number for number in range(count))
        answers = ask(server.address, flood + ONCE)
        places = re.findall(rb"\r\nLocation: https://mail.example.com/(.*)\r\n", answers)
        assert places == [b"%d" % number for number in range(count)] + [b"once"]
        assert len(server.access_log) == count + 1


@pytest.mark.parametrize("count", (0, 1, 7, 8, 9, 16))
def test_a_malformed_head_after_pipelined_requests(count):
    """Whatever its place in the pipeline, it must never wait for its deadline."""
    data = KEEP % 1 * count + b"GET / HTTP/1.1\r\nHost: x\n\n"
    with listening() as server:
        start = time.monotonic()
        assert statuses(ask(server.address, data)) == [302] * count + [400]
        assert time.monotonic() - start < 3


SPLIT = [ONCE, b"\r\n" + ONCE, ONCE[:-2] + b"X : y\r\n\r\n", ONCE[:-2] + b"a: \r\n\tb\r\n\r\n"]


@pytest.mark.parametrize("head", SPLIT)
def test_one_byte_a_packet(head):
    """Where the packets end must never change the answer."""
    with listening() as server:
        with contextlib.closing(connect(server.address)) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for number in range(len(head)):
                sock.send(head[number : number + 1])
            answers = read_all(sock), ask(server.address, head)
        first, second = (re.sub(rb"Date: [^\r]*", b"", answer) for answer in answers)
        assert first == second and len(statuses(first)) == 1


START = b"GET / HTTP/1.1\r\nHost: mail.example.com\r\n"
FRAMINGS = {
    b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG": [400],
    b"Content-Length: 47\r\n\r\n": [302],
    b"Content-Length: 00\r\n\r\n": [302, 302],
    b"Content-Length:\r\n\r\n": [400],
    b"Content-Length: \xb2\r\n\r\n": [400],
    b"Content-Length: \xa00\r\n\r\n": [400],
    b"Content-Length : 47\r\n\r\n": [400],
    b"Content-Length: 0\x0b\r\n\r\n": [400],
    b"Transfer-Encoding: chunked\r\n\r\n0\r\nHost: evil.example\r\n\r\n": [302],
    b"Transfer-Encoding: xchunked\r\n\r\n": [400],
    b"Transfer-Encoding: gzip,\tChunked\r\n\r\n": [302],
    b"Transfer-Encoding: chunked, gzip\r\n\r\n": [400],
    b"Transfer-Encoding: \x85chunked\r\n\r\n": [400],
    b"Transfer-Encoding:\r\n chunked\r\n\r\n": [400],
    b"Transfer-Encoding : chunked\r\n\r\n": [400],
    b"\n": [400],
    b"\r\r\n\r\n": [400],
    b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n": [302, 302],
    b"Connection: keep-alive, close\r\n\r\n": [302],
}


@pytest.mark.parametrize("fields", FRAMINGS, ids=ascii)
def test_one_request_is_never_two(fields):
    """Where others may see a body, what follows the head must never be answered."""
    smuggled = b"GET /smuggled HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    with listening() as server:
        assert statuses(ask(server.address, START + fields + smuggled)) == FRAMINGS[fields]


OTHER_PROTOCOLS = [
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", [], "TLS on the plain HTTP port"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [505], "not HTTP/1"),
    (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", [400], "malformed request line"),
    (b"EHLO a\r\n", [400], "malformed request line"),
    (b"\x03\x00\x00\x13\x0e\xe0\r\n\r\n", [400], "control byte"),
    (b"\r\n\r\n\0\r\nQUIT\n\x21\x11", [400], "no request line (version 2 of the PROXY protocol"),
    (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 80\r\n" + ONCE, [400], "PROXY protocol"),
    (b"\x80\x2e\x01\x00\x02", [], "no whole request head in time"),
]


@pytest.mark.parametrize("first, expected, reason", OTHER_PROTOCOLS)
def test_other_protocols(first, expected, reason):
    """What is not HTTP must never hang beyond a head's deadline; one line tells why."""
    with listening(Quick) as server:
        assert statuses(ask(server.address, first))[:1] == expected
        assert len(server.error_log) == 1 and f"refused: {reason}" in server.error_log[0]


FORGERIES = [
    b'" 200 0 "-" "-"\r\n6.6.6.6 - - [] "GET / HTTP/1.1',
    b"\n[x] owahttps: 6.6.6.6 refused",
]
FORGERIES += [b"\x1b[31m", b'"', b"\\", b"\xff\x9b\xe2\x80\xa8", b"\0", b"\r", b"\x85", b"\t"]


@pytest.mark.parametrize("forged", FORGERIES, ids=ascii)
def test_no_byte_of_the_network_forges_a_log_line(forged):
    """One answer is one line of the access log, in printable ASCII, and at most one error."""
    access = r'127\.0\.0\.1 - - \[[^]]*\] "[ !#-~]*" [0-9]{3} [0-9]+ "[ !#-~]*" "[ !#-~]*"\n'
    heads = [b"GET /a%s HTTP/1.1\r\nHost: h\r\n\r\n", b"GET / HTTP/1.1\r\nHost: h%s\r\n\r\n"]
    heads += [b"GET / HTTP/1.1\r\nHost: h\r\nReferer: x%sy\r\n\r\n", b"G%s / HTTP/1.1\r\n\r\n"]
    with listening() as server:
        for head in heads:
            lines, errors = len(server.access_log), len(server.error_log)
            with contextlib.closing(connect(server.address, head % forged)) as sock:
                sock.shutdown(socket.SHUT_WR)
                count = len(statuses(read_all(sock)))
            assert len(server.access_log) == lines + count
            assert len(server.error_log) <= errors + 1
        assert all(re.fullmatch(access, line) for line in server.access_log)
        for line in server.error_log:
            assert re.fullmatch(r"\[[^]]*\] owahttps: 127\.0\.0\.1 refused: [ -~]*\n", line)


# ---- The listener under attack -------------------------------------------------------


def test_slow_clients_are_cut_at_their_deadline():
    """A byte now and then must never prolong a head's deadline, nor hold up a normal client."""
    with listening(Quick, max_connections=200) as server:
        born, ends, normal = time.monotonic(), {}, []
        head = b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 9999
        slow = {connect(server.address, b"G"): bytearray(head[1:]) for _ in range(100)}
        while slow and time.monotonic() < born + 10:
            for sock in select.select(list(slow), [], [], 0.02)[0]:
                assert read_all(sock)[:5] != b"HTTP/"
                ends[sock] = time.monotonic() - born
                del slow[sock]
                sock.close()
            for sock, rest in slow.items():
                with contextlib.suppress(OSError):
                    sock.send(rest[:1])
                    del rest[:1]
            start = time.monotonic()
            assert is_whole(ask(server.address))
            normal.append(time.monotonic() - start)
        assert len(ends) == 100 and min(ends.values()) > 0.9 and max(ends.values()) < 5
        assert sorted(normal)[len(normal) // 2] < 1
        assert sum("no whole request head in time" in line for line in server.error_log) == 100


def test_the_connection_that_waits_longest_makes_room():
    """At the cap a new client must never wait, and no more than one old one may pay for it."""
    with listening(max_connections=20) as server:
        idle = []
        for _ in range(20):
            idle.append(connect(server.address, b"GET"))
            assert wait_until(lambda: open_count(server) == len(idle))
        with contextlib.closing(connect(server.address, b"G")) as kept:
            assert wait_until(lambda: closed(idle[:1]))
            kept.sendall((KEEP % 1)[1:])
            assert is_whole(kept.recv(9999)) and not closed(idle[1:])
            assert is_whole(ask(server.address)) and open_count(server) <= 20
        for sock in idle:
            sock.close()


def test_one_connection_at_a_time():
    """With room for only one, each client gets its answer, and each socket is closed once."""
    ended = []
    with listening(max_connections=1) as server:
        close = server.close_request
        server.close_request = lambda request: (ended.append(request), close(request))
        socks = [connect(server.address, KEEP % 1) for _ in range(20)]
        assert wait_until(lambda: len(ended) >= 19)
        assert all(is_whole(sock.recv(9999)) for sock in socks)
        for sock in socks:
            sock.close()
        assert wait_until(lambda: not open_count(server)) and len(set(map(id, ended))) == 20


def test_bytes_have_a_budget():
    """Beyond it the oldest that hold bytes pay; those that hold none are left alone."""
    with listening() as server:
        server.max_bytes = 200000
        idle = [connect(server.address, KEEP % 1) for _ in range(30)]
        assert all(is_whole(sock.recv(9999)) for sock in idle)
        data = b"GET / HTTP/1.1\r\nX: " + b"x" * 30000
        crowd = [connect(server.address, data) for _ in range(40)]
        assert wait_until(lambda: len(closed(crowd)) >= 34)
        assert not closed(idle) and not server.error_log  # nobody is to be banned for it
        assert is_whole(ask(server.address)) and not closed(crowd[-1:])
        assert server.held_bytes <= 200000
        for sock in crowd + idle:
            sock.close()
        assert wait_until(lambda: not open_count(server)) and server.held_bytes == 0


@linux
def test_many_small_holders_and_large_heads():
    """Those that one large head costs their place are closed, and never forgotten while open."""
    with listening(Quick, max_connections=2000) as server:
        server.max_bytes = 40000
        small = [connect(server.address, b"G") for _ in range(700)]
        assert wait_until(lambda: open_count(server) == 700)
        large = [connect(server.address, b"GET / HTTP/1.1\r\nX: " + b"x" * 32000) for _ in range(9)]
        assert wait_until(lambda: len(closed(small)) > 600)
        assert wait_until(lambda: not open_count(server)) and len(closed(small + large)) == 709
        assert not [line for line in server.error_log if "error" in line]
        for sock in small + large:
            sock.close()


@linux
def test_clients_that_ask_for_much_and_vanish(tmp_path):
    """Their answers must never pile up: memory is free at once when they are dropped."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    (folder / "big").write_bytes(b"x" * 65536)
    head = f"GET {owahttps.ACME_PREFIX}big HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    with serving("--acme-dir", str(folder), stdout=subprocess.DEVNULL) as (child, address):
        for _ in range(3):
            socks = [connect(address, head * 100) for _ in range(100)]
            for sock in socks:
                abort(sock)
        assert is_whole(ask(address))
        with open(f"/proc/{child.pid}/status") as file:
            peak = int(re.search(r"VmHWM:\s+(\d+)", file.read()).group(1)) // 1024
        assert peak < 100


@pytest.mark.parametrize("before", (0, 7, 8))
def test_a_body_after_pipelined_requests(before):
    """Whatever its place in the pipeline, its answer must never be torn by a reset."""
    post = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n"
    with listening() as server:
        with contextlib.closing(connect(server.address, KEEP % 1 * before + post)) as sock:
            select.select([sock], [], [], 5)
            with contextlib.suppress(OSError):
                for _ in range(10):
                    sock.sendall(b"x" * 100000)
            assert statuses(read_all(sock)) == [302] * (before + 1)


@pytest.mark.parametrize("chunked", (False, True))
@pytest.mark.parametrize("size", (1, 8192, 1 << 20))
def test_a_body_never_turns_the_answer_into_a_reset(size, chunked):
    """A client that sends its whole body before it reads must get the whole answer."""
    body = (KEEP % 666 * (size // 40 + 1))[:size]
    framing = b"Content-Length: %d\r\n\r\n%s" % (size, body)
    if chunked:
        framing = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (size, body)
    with listening() as server:
        for _ in range(3):
            assert is_whole(ask(server.address, b"POST / HTTP/1.1\r\nHost: a\r\n" + framing))
        assert len(server.access_log) == 3


@needs("curl")
@pytest.mark.parametrize("options", ("", "-H Expect:", "-H Transfer-Encoding:chunked", "-0"))
def test_curl_posts_a_megabyte(options, tmp_path):
    """curl must never report a reset, nor be told to go on with the body."""
    (tmp_path / "body").write_bytes(b"x" * (1 << 20))
    with listening() as server:
        words = ["curl", "-sS", "-i", "--noproxy", "*", "--data-binary", f"@{tmp_path / 'body'}"]
        words += [f"http://127.0.0.1:{server.server_port}/a", *options.split()]
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=20)
        assert (done.returncode, statuses(done.stdout)) == (0, [302]), done.stderr


def test_a_body_has_an_end():
    """A client that sends for ever must be cut off, by bytes or by time."""

    class Short(Quick):
        max_drained = 400000

    post = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999\r\n\r\n"
    with listening(Short) as server:
        with contextlib.closing(connect(server.address, post)) as sock:
            sent = 0
            with contextlib.suppress(OSError):
                while sent < 1 << 26:
                    sent += sock.send(b"x" * 65536)
            assert sent < 1 << 26
        with contextlib.closing(connect(server.address, post)) as sock:
            assert is_whole(read_all(sock)) and wait_until(lambda: not open_count(server))


@pytest.mark.parametrize(
    "start, status", [(b"GET /", 414), (b"GET / HTTP/1.1\r\nX: ", 431), (b"", 400)]
)
def test_a_million_bytes_without_a_line_end(start, status):
    """Never more than a head's worth is kept, and the client sees why, not a reset."""
    with listening() as server:
        server.max_bytes = owahttps.MAX_HEAD + 2 * RedirectHandler.max_received
        with contextlib.closing(connect(server.address)) as sock:

            def send():
                sock.sendall(start + b"a" * 1000000)
                sock.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=send)
            sender.start()
            assert is_whole(read_all(sock), status)
            sender.join(10)


@pytest.mark.parametrize("after", (2, 999, 1 << 20))
def test_a_last_request_that_fills_the_receive_buffer(after):
    """What the client sends on behind it must never reset the answer."""
    size = RedirectHandler.max_received
    head = ONCE[:-2] + b"X: " + b"x" * (size - len(ONCE) - 5) + b"\r\n\r\n"
    assert len(head) == size
    with listening() as server:
        assert all(is_whole(ask(server.address, head + b"x" * after)) for _ in range(3))


def test_pipelined_answers_do_not_wait_for_an_acknowledgement():
    """Nagle's algorithm against delayed acknowledgement: 40 ms for each batch of answers."""
    with listening() as server, contextlib.closing(connect(server.address)) as sock:
        seconds = []
        for _ in range(60):
            start, data = time.monotonic(), b""
            sock.sendall(KEEP % 1 * 100)
            while len(statuses(data)) < 100:
                data += sock.recv(65536)
            seconds.append(time.monotonic() - start)
        assert min(seconds[20:]) < 0.035


def test_a_client_that_never_reads():
    """It is dropped at its deadline, the server stops reading from it, and nobody else waits."""
    with listening(Quick) as server:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            server.socket.setsockopt(socket.SOL_SOCKET, option, 4096)
        with contextlib.closing(socket.socket()) as deaf:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                deaf.setsockopt(socket.SOL_SOCKET, option, 4096)
            deaf.connect(server.address)
            deaf.setblocking(False)
            requests = b"A / HTTP/1.1\r\nHost:a\r\n\r\n" * 40000
            while select.select([], [deaf], [], 0.1)[1]:
                requests = requests[deaf.send(requests) :]
            assert requests and is_whole(ask(server.address))
            assert wait_until(lambda: not open_count(server))


def test_a_flood_of_pipelined_requests_takes_turns():
    """Clients that send hundreds of requests at once must never hold up one that sends one."""
    with listening(Quick) as server, contextlib.closing(connect(server.address)) as kept:
        kept.sendall(KEEP % 1)
        assert is_whole(kept.recv(9999))
        flood = [connect(server.address, KEEP % 1 * 1000) for _ in range(100)]
        waits = []
        for _ in range(20):
            start = time.monotonic()
            kept.sendall(KEEP % 2)
            assert is_whole(kept.recv(9999))
            waits.append(time.monotonic() - start)
        assert sorted(waits)[10] < 0.5
        for sock in flood:
            sock.close()


def test_half_close_is_answered():
    """A client that has said all it has to say must never be taken for gone."""
    with listening() as server, contextlib.closing(connect(server.address, KEEP % 1 * 20)) as sock:
        sock.shutdown(socket.SHUT_WR)
        assert statuses(read_all(sock)) == [302] * 20


def abort(sock):
    sizes = "hh" if os.name == "nt" else "ii"
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack(sizes, 1, 0))
    sock.close()


@pytest.mark.parametrize("end", (socket.socket.close, abort))
def test_clients_that_go_away_leave_nothing_behind(end):
    """A client that goes at any stage must never leave a connection, nor be a fault."""
    post = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999\r\n\r\nx"
    stages = (b"", b"G", START, KEEP % 1, KEEP % 1 * 50, b"\x16\x03\x01", post, b"a" * 9000)
    with listening() as server:
        for number in range(400):
            end(connect(server.address, stages[number % len(stages)]))
        assert is_whole(ask(server.address)) and wait_until(lambda: not open_count(server))
        assert not [line for line in server.error_log if "refused: " not in line]


def test_acme_tokens_of_both_layouts(tmp_path):
    """certbot's layout and acme-tiny's, looked up at each request; never a link, never cut."""
    below = tmp_path / ".well-known" / "acme-challenge"
    rule = RedirectRule(acme_dir=str(tmp_path))
    with listening(rule=rule) as server:

        def status(token):
            return statuses(ask(server.address, get(owahttps.ACME_PREFIX + token)))

        assert status("one") == [404]
        (tmp_path / "one").write_bytes(b"1" * 65536)
        assert status("one") == [200]
        below.mkdir(parents=True)
        (below / "two").write_bytes(b"2")
        (below / "long").write_bytes(b"x" * 65537)
        assert [status("two"), status("long"), status(".well-known")] == [[200], [404], [404]]
        if hasattr(os, "mkfifo"):
            os.symlink(SCRIPT, str(tmp_path / "link"))
            os.mkfifo(str(tmp_path / "fifo"))
            assert [status("link"), status("fifo")] == [[404], [404]]


def test_a_token_that_may_not_be_read_is_told(monkeypatch):
    def lstat(path):
        raise PermissionError(errno.EACCES, "no", path)

    monkeypatch.setattr(os, "lstat", lstat)
    with listening(rule=RedirectRule(acme_dir="/x")) as server:
        assert statuses(ask(server.address, get(owahttps.ACME_PREFIX + "one"))) == [404]
        assert len(server.error_log) == 1 and "cannot be read by this user" in server.error_log[0]


@linux
@pytest.mark.parametrize("other", ("link", "fifo"))
def test_a_token_that_is_swapped(other, tmp_path, monkeypatch):
    """One that becomes a link or a FIFO between two looks must never be followed, nor wait."""
    if other == "link":
        os.symlink(SCRIPT, str(tmp_path / "token"))
    else:
        os.mkfifo(str(tmp_path / "token"))
    regular = os.stat(SCRIPT)
    monkeypatch.setattr(os, "lstat", lambda path: regular)
    assert owahttps.read_token(str(tmp_path), "token") is None


# ---- Faults --------------------------------------------------------------------------


def failing_at_first(function, error, times=1):
    """Return this function, which at first fails so many times; what is closed stays closed."""
    left = [error] * times

    def call(*args):
        if left:
            if function and function.__name__ == "close_request":
                function(*args)
            raise left.pop()
        return function(*args)

    return call


STEPS = ("setup", "handle", "receive", "reply", "send", "close_or_drain")


@pytest.mark.parametrize("where", STEPS)
def test_an_exception_in_a_handler_costs_one_connection_and_one_line(where):
    """A bug in a subclass must never end the server, nor hold its connection."""
    error = [ZeroDivisionError("\x1b\n")]

    def broken(self):
        if error:
            raise error.pop()
        return getattr(super(Broken, self), where)()

    Broken = type("Broken", (RedirectHandler,), {where: broken})
    with listening(Broken) as server:
        broken_off = b"302" not in ask(server.address)
        assert broken_off == (where != "close_or_drain") and not error
        assert is_whole(ask(server.address)) and wait_until(lambda: not open_count(server))
        line = r"\[.*\] owahttps: 127.0.0.1 error: ZeroDivisionError\([ -~]*\n"
        assert len(server.error_log) == 1 and re.fullmatch(line, server.error_log[0])


FAULTS = {
    "accept, that client": ("get_request", OSError(errno.ECONNABORTED, "gone")),
    "accept, no memory": ("get_request", OSError(errno.ENOMEM, "no memory")),
    "accept, no buffers": ("get_request", OSError(errno.ENOBUFS, "no buffers")),
    "accept, no descriptors": ("get_request", OSError(errno.EMFILE, "too many")),
    "accept, none in the system": ("get_request", OSError(errno.ENFILE, "too many")),
    "verify_request": ("verify_request", ZeroDivisionError()),
    "close": ("close_request", OSError(errno.EIO, "close")),
    "out of memory": ("process_request", MemoryError()),
    "settle": ("settle", OSError(errno.ENOMEM, "epoll_ctl")),
    "sweep": ("sweep", MemoryError()),
    "flush": ("flush_logs", MemoryError()),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_never_ends_the_listener(what):
    """Whatever fails, what is open is served on, and so are the next clients."""
    name, error = FAULTS[what]
    with listening() as server, contextlib.closing(connect(server.address, KEEP % 1)) as kept:
        assert is_whole(kept.recv(9999)) and wait_until(lambda: open_count(server) == 1)
        setattr(server, name, failing_at_first(getattr(server, name), error, 3))
        for _ in range(4):
            ask(server.address)
        assert is_whole(ask(server.address))
        if what != "accept, no descriptors":
            kept.sendall(KEEP % 2)
            assert is_whole(kept.recv(9999))


def test_a_selector_that_fails_never_ends_the_listener():
    with listening() as server:
        assert is_whole(ask(server.address))
        error = OSError(errno.ENOMEM, "epoll_wait")
        server.selector.select = failing_at_first(server.selector.select, error, 5)
        assert is_whole(ask(server.address)) and is_whole(ask(server.address))


@pytest.mark.parametrize("method", ("write", "flush"))
def test_a_log_of_the_callers_own_that_fails(method):
    """It must cost its lines, and at most that connection, never the server."""
    with listening() as server:
        for name in ("access_log", "error_log"):
            log = Lines()
            setattr(log, method, failing_at_first(getattr(log, method), OSError(28, "full"), 3))
            setattr(server, name, log)
            for _ in range(4):
                ask(server.address, b"BAD\r\n\r\n")
            assert is_whole(ask(server.address))


def test_out_of_file_descriptors():
    """A server that can accept nothing must never spin; the one that waits longest makes room."""
    with listening() as server:
        waiting = [connect(server.address, b"G") for _ in range(3)]
        assert wait_until(lambda: open_count(server) == 3)
        calls, real = [], server.get_request

        def get_request():
            calls.append(1)
            if open_count(server) == 3:
                raise OSError(errno.EMFILE, "Too many open files")
            return real()

        server.get_request = get_request
        assert is_whole(ask(server.address))
        assert len(calls) < 10 and open_count(server) == 2
        for sock in waiting:
            sock.close()


@pytest.mark.parametrize("number", (errno.EMFILE, errno.ENFILE))
def test_a_stop_without_file_descriptors_does_not_wait(number):
    with listening() as server:
        server.get_request = failing_at_first(None, OSError(number, "none"), 10**6)
        start = time.monotonic()
        server.shutdown()
        assert time.monotonic() - start < 3


def test_a_handler_that_closes_its_own_socket():
    class Closing(RedirectHandler):
        def send(self):
            super().send()
            if b"away" in self.incoming:
                self.request.close()

    with listening(Closing) as server:
        with contextlib.closing(connect(server.address, KEEP % 1)) as sock:
            assert is_whole(sock.recv(9999))
            sock.sendall(b"GET /away HTTP/1.1\r\n")
            assert is_whole(ask(server.address))


@pytest.mark.parametrize("jump", (-1e9, 1e9))
def test_a_clock_that_jumps_changes_no_deadline(jump, monkeypatch):
    """A step of the wall clock must never cut a connection, nor keep one that is overdue."""

    class Half(Quick):
        idle_seconds = 60.0

    with listening(Half) as server, contextlib.closing(connect(server.address, KEEP % 1)) as idle:
        assert is_whole(idle.recv(9999))
        with contextlib.closing(connect(server.address, b"GET")) as slow:
            start, now = time.monotonic(), time.time()
            monkeypatch.setattr(time, "time", lambda: now + jump)
            assert is_whole(ask(server.address))
            assert read_all(slow) == b"" and 0.9 < time.monotonic() - start < 5
            idle.sendall(ONCE)
            assert is_whole(read_all(idle))


def test_a_process_that_was_held_up_drops_nobody():
    """What came while the process was stopped (a laptop's lid) must be answered, however late."""
    with listening(Quick) as server, contextlib.closing(connect(server.address, KEEP % 1)) as sock:
        assert is_whole(sock.recv(9999))
        real, held_up = server.selector.select, threading.Event()

        def select(timeout):
            if held_up.is_set():
                return real(timeout)
            held_up.set()
            sock.sendall(ONCE)
            time.sleep(2 * Quick.idle_seconds)  # is interrupted, and sees nothing
            return []

        server.selector.select = select
        assert is_whole(read_all(sock))


# ---- The listener as a process -------------------------------------------------------


def end(child, by="SIGTERM"):
    """Stop it; it must exit with 0 within some seconds: what it wrote to standard error."""
    start = time.monotonic()
    child.send_signal(getattr(signal, by))
    err = child.communicate(timeout=20)[1]
    assert child.returncode == 0 and time.monotonic() - start < 8
    return err.decode() if err else ""


@linux
@pytest.mark.parametrize(
    "shell, told",
    [
        ("exec >&-;", ["standard output is closed"]),
        ("exec <&- >&-;", ["standard output is closed"]),
        ("exec >/dev/full;", ["log cannot be written", "21 lines of the log were lost"]),
        ("exec 2>/dev/full;", []),
        ("exec 2>&-;", []),
    ],
)
def test_standard_files_that_cannot_be_written(shell, told):
    """No redirect may be lost with a log; each fault is told once, and never by a traceback."""
    settings = {} if ">&-" in shell or "full" in shell else {"stdout": subprocess.DEVNULL}
    with serving(shell=shell, **settings) as (child, address):
        assert all(is_whole(ask(address)) for _ in range(20))
        assert ask(address, b"\x16") == b"" and is_whole(ask(address, b"x\r\n\r\n"), 400)
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=20)
        assert child.returncode == 0 and b"Traceback" not in err
        assert all(err.decode().count(text) == 1 for text in told), err
        assert all(line.startswith(b"127.0.0.1 - - [") for line in out.splitlines())


@linux
def test_a_reader_of_the_log_that_exits():
    """A pipe that breaks must never end the server."""
    with serving() as (child, address):
        assert is_whole(ask(address)) and b'"GET /once HTTP/1.1" 302' in child.stdout.readline()
        child.stdout.close()
        child.stdout = None
        assert all(is_whole(ask(address)) for _ in range(20))
        assert "Broken pipe" in end(child)


@linux
@pytest.mark.parametrize("exits", (False, True))
def test_standard_error_stalled_from_the_start(exits):
    """A full or broken pipe must never keep the server from starting, answering or ending."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    if exits:
        os.close(reader)
    with serving(stdout=subprocess.DEVNULL, stderr=writer) as (child, address):
        os.close(writer)
        assert all(is_whole(ask(address, b"x\r\n\r\n"), 400) for _ in range(20))
        end(child)
    if not exits:
        os.close(reader)


@linux
def test_sixty_four_file_descriptors():
    """Swamped beyond its descriptors, the server must never leave a normal client unanswered."""
    for options in ((), ("--max-connections", "5000")):
        log = {"stdout": subprocess.DEVNULL}
        with serving(*options, shell="ulimit -n 64;", **log) as (child, address):
            crowd = [connect(address, b"G") for _ in range(200)]
            assert all(is_whole(ask(address)) for _ in range(5))
            with open(f"/proc/{child.pid}/stat") as stat:
                ticks = sum(map(int, stat.read().rpartition(")")[2].split()[11:13]))
            assert ticks < 3 * os.sysconf("SC_CLK_TCK")
            for sock in crowd:
                sock.close()
            end(child)


def load(address, kept, answers, torn, stop):
    """Ask again and again, on one connection or on many, until the server has gone."""
    with contextlib.suppress(OSError):
        while not stop.is_set():
            with contextlib.closing(connect(address)) as sock:
                last = False
                while not last and not stop.is_set():
                    sock.sendall(KEEP % 1 if kept else ONCE)
                    data = sock.recv(65536)
                    while data and not is_whole(data):
                        more = sock.recv(65536)
                        if not more:
                            torn.append(data)
                            return
                        data += more
                    last = not data or b"\r\nConnection: close\r\n" in data
                    answers.append(data)


@linux
@pytest.mark.parametrize("by", ("SIGTERM", "SIGINT", "SIGHUP"))
def test_a_signal_under_load_tears_no_answer(by):
    """What is under way gets whole answers; the last one says so; the exit does not wait."""
    with serving(stdout=subprocess.DEVNULL) as (child, address):
        answers, torn, stop = [], [], threading.Event()
        shared = (answers, torn, stop)
        clients = [threading.Thread(target=load, args=(address, n % 2, *shared)) for n in range(8)]
        for client in clients:
            client.start()
        halves = [connect(address, (KEEP % 2)[: n * 5]) for n in range(1, 8)]
        assert wait_until(lambda: len(answers) > 500)
        child.send_signal(getattr(signal, by))
        wait_until(lambda: not any(client.is_alive() for client in clients), 0.1)
        for number, half in enumerate(halves, 1):
            half.sendall((KEEP % 2)[number * 5 :])
            answer = read_all(half)
            assert is_whole(answer) and b"\r\nConnection: close\r\n" in answer
            half.close()
        end(child, by)
        stop.set()
        for client in clients:
            client.join(10)
        assert not torn


@linux
def test_a_signal_with_everything_stalled():
    """Stalled logs and a client amid a head must never keep the server from ending."""
    pipes = [os.pipe(), os.pipe()]
    with serving(stdout=pipes[0][1], stderr=pipes[1][1]) as (child, address):
        flood = b"".join(KEEP % number for number in range(2000)) + b"x\r\n\r\n"
        assert statuses(ask(address, flood))[-1:] == [400]
        with contextlib.closing(connect(address, b"GET / HT")):
            end(child)
    for fd in sum(pipes, ()):
        os.close(fd)


@linux
@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="needs root")
def test_user_gives_root_up():
    """After the port is bound nothing of root may be left, neither in user nor in group."""
    with serving("--user", "nobody") as (child, address):
        assert is_whole(ask(address))
        with open(f"/proc/{child.pid}/status") as file:
            ids = re.findall(r"(?m)^[UG]id:\s+(\d+)\s+(\d+)\s+(\d+)\s+(\d+)", file.read())
        assert len(ids) == 2 and "0" not in ids[0] + ids[1]


CAPS = [
    (None, 1024, 20000, 16384),
    (2000, 100, 1024, 960),
    (None, 64, 64, 8),
    (None, -1, -1, 16384),
]


@pytest.mark.parametrize("wanted, soft, hard, cap", CAPS)
def test_connection_cap(wanted, soft, hard, cap, monkeypatch):
    resource = pytest.importorskip("resource")
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    if wanted is None:
        wanted = owahttps.parse(["serve"]).max_connections
    assert owahttps.connection_cap(wanted) == cap and limits[-1][0] == hard


WARNINGS = [
    ({}, "127.0.0.1", []),
    ({"status": 301, "host": "a"}, "127.0.0.1", ["browsers keep a 301"]),
    ({"status": 308, "host": "a"}, "192.0.2.1", []),
    ({"status": 308}, "192.0.2.1", ["for every name"]),
    ({"https_port": 8443}, "127.0.0.1", ["Let's Encrypt"]),
    ({"https_port": 8443, "acme_dir": "/x"}, "127.0.0.1", []),
]


@pytest.mark.parametrize("fields, host, says", WARNINGS, ids=str)
def test_warnings(monkeypatch, fields, host, says):
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    warnings = list(owahttps.warnings_for(RedirectRule(**fields), host))
    assert len(warnings) == len(says) and all(map(str.__contains__, warnings, says))
    monkeypatch.setattr(os, "geteuid", lambda: 0, raising=False)
    assert any("root" in line for line in owahttps.warnings_for(RedirectRule(), "::"))


def test_what_differs_on_windows(monkeypatch):
    """Each difference, simulated: select()'s 512 sockets, an exclusive port, http.sys."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert owahttps.connection_cap(16384) == 500
    for number in (errno.EADDRINUSE, errno.EACCES):
        trouble = owahttps.bind_trouble(OSError(number, "in use"), "", 80)
        assert "PID 4 is http.sys" in trouble
    exclusive = socket.SO_KEEPALIVE
    monkeypatch.setattr(socket, "SO_EXCLUSIVEADDRUSE", exclusive, raising=False)
    with RedirectServer(("127.0.0.1", 0)) as server:
        assert server.socket.getsockopt(socket.SOL_SOCKET, exclusive)


# ---- Recipes -------------------------------------------------------------------------

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
HOST_OF_62 = f"{'a-' * 30}b.example"
# What the steps must have to the letter, in this order.
LABELS = [
    *("Owahttps.asp", "Inetpub\\Wwwroot\\Owaasp", "SERVER_PORT and SERVER_NAME"),
    *("Internet Service Manager", "Default Web Site", "Exchange folder", "Properties"),
    *("Custom Errors", "403.4", "Message Type", "URL", "/owaasp/owahttps.asp"),
    *("Directory Security", "Secure Communications", "Edit", "Require secure channel (SSL)"),
    *("Require 128-bit encryption", "net stop iisadmin /y"),
    "http://HOST/exchange must land on https://SERVER_NAME/exchange",
]
# The options, whether the recipe says it, and what.
RECIPES_SAY = [
    ("", True, "Q319878", "check HOST\n"),
    ("", False, "403.18", "ActiveSync", "Forms-based", "IIS 6"),
    ("--port 8080", True, '"SERVER_PORT")=8080', "check HOST:8080\n"),
    ("--port 8080", False, "=80 ", "any port but 80 "),
    (HOST, True, '& "mail.example.com"', "check mail.example.com\n"),
    (HOST, False, "SERVER_NAME"),
    ("--https-port 8443 --path /owa", True, ':8443/owa"', "the owa folder"),
    ("--https-port 8443 --path /owa", False, "xchange folder"),
    ("exchange2003", True, "403.18", "KB 817379", "Forms-based"),
    ("exchange2003", False, "Exchange 2000"),
    (f"exchange {HOST}", True, "PowerShell", "Microsoft's own", "UrlPrefix"),
    (f"exchange {HOST}", True, "check mail.example.com --path /owa\n"),
    (f"exchange {HOST}", False, "SERVER_NAME", "www."),
    (IIS, True, "Redirect all requests to exact destination (instead of relative to destination)"),
    (IIS, True, '/bindings:"http/*:80:app.example.com,http/*:80:www.app.example.com"'),
    (IIS, True, '-exactDestination:false -destination:"https://app.example.com" ||'),
    (IIS, True, "check app.example.com www.app.example.com --keep-path --host app.example.com\n"),
    (IIS, False, "Exchange", "autodiscover and", "/owa"),
    (f"iis {HOST} --path /a --https-port 444", True, '"https://mail.example.com:444/a"'),
    (f"exchange {HOST} --keep-path --port 81", True, ":81:mail"),
    (f"exchange {HOST} --keep-path --port 81", False, "mail.example.com/owa"),
    (f"exchange {HOST} --status 301", True, "-httpResponseStatus:Permanent", "max-age=86400"),
    (f"exchange {HOST} --status 308", True, "-httpResponseStatus:PermRedirect", "IIS 10"),
    (f"iis --host {HOST_OF_62}", True, f"Host name: {HOST_OF_62}."),
]


def generate(words):
    """Return what `owahttps.py generate` prints, which must be ASCII."""
    code, out, err = run("generate", *words.split())
    assert (code, err) == (0, "")
    out.encode("ascii")
    return out


def test_the_articles_page_to_the_letter():
    assert generate("--part asp") == generate("--part Owahttps.asp") == ARTICLE


def test_the_articles_steps():
    steps = generate("--part steps")
    numbers = re.findall(r"(?m)^ ?(\d+)\. ", steps)
    assert numbers == [str(number) for number in range(1, 19)]
    place = 0
    for label in LABELS:
        place = steps.index(label, place) + len(label)


def test_recipes_say():
    for words, says, *texts in RECIPES_SAY:
        out = generate(words)
        assert [text for text in texts if (text in out) != says] == [], words
        assert out.count("\n") <= (95 if words.startswith(("exchange ", "iis ")) else 65)
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


@pytest.mark.parametrize("field", ["host", "path", "health", "allow_hosts", "api"])
def test_hostile_values_reach_no_recipe(field):
    """What cmd.exe, VBScript or a server could take for more than a value never makes a rule."""
    for text in [*HOSTILE.split(), "a\nb", "a b"]:
        value = text if "host" in field else f"/{text}"
        with pytest.raises(RuleError):
            RedirectRule(**{field: (value,) if field in ("allow_hosts", "api") else value})


def test_write(tmp_path):
    """All files or none, never over another one; and what comes next."""
    words = ["generate", "--write", str(tmp_path)]
    page, steps = tmp_path / "Owahttps.asp", tmp_path / "owahttps-steps.txt"
    for _ in range(2):
        code, out, err = run(*words)
        assert (code, out) == (0, "Owahttps.asp\nowahttps-steps.txt\n")
        assert "next: owahttps-steps.txt" in err
        assert page.read_bytes() == ARTICLE.replace("\n", "\r\n").encode()
    assert b"18. Test:" in steps.read_bytes()
    page.write_bytes(b"mine")
    steps.unlink()
    code, out, err = run(*words)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "exists with other content" in err and list(tmp_path.iterdir()) == [page]
    err = run("generate", "nginx", *words[1:])[2]
    assert "/etc/nginx/conf.d/owahttps.conf, then: nginx -t" in err


def test_write_that_fails_half_way(tmp_path, monkeypatch):
    """A full disk must never leave half a recipe, nor cost a file that came between."""
    other, real = tmp_path / "owahttps-undo.cmd", open

    def open_(path, mode="r", **settings):
        if str(path) == str(other) and "x" in mode:
            with real(str(other), "w") as file:
                file.write("somebody else's")
        return real(path, mode, **settings)

    monkeypatch.setattr("builtins.open", open_)
    assert run("generate", "exchange", "--host", "a.example", "--write", str(tmp_path))[0] == 1
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [other] and other.read_text() == "somebody else's"


def test_a_script_that_is_redirected_has_windows_line_ends():
    command = [sys.executable, SCRIPT, "generate", *IIS.split(), "--part", "script"]
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    assert out.startswith(b"@echo off\r\n") and out.count(b"\n") == out.count(b"\r\n")


def test_the_systemd_unit(tmp_path):
    text = generate("systemd --host mail.example.com --allow-host a.b --keep-path --api /v1")
    assert f"serve --port 80 --keep-path {HOST} --allow-host a.b --allow-host mail" in text
    assert " --api /v1\n" in text and "\nRestart=always\n" in text
    if not find("systemd-analyze"):
        pytest.skip("no systemd-analyze here")
    unit = tmp_path / "owahttps.service"
    unit.write_text(text.replace("/usr/bin/python3 -I /usr/local/bin/owahttps.py", sys.executable))
    command = ["systemd-analyze", "verify", str(unit)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0 and b"owahttps" not in done.stdout, done.stdout


# ---- The check: certificates and servers ---------------------------------------------

# Each case is a site on real sockets, and what `check` must find there.  A site is a plain and a
# TLS server on free ports of 127.0.0.1; PLAIN and SECURE stand for their ports.

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
[bare]
basicConstraints = critical,CA:FALSE
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
CERT = "redirection-invalid-cert."
# Issuer, alternative names, first and last day from today, extensions; what is found besides the
# right redirect ("": it is not a server's).
CERTIFICATES = {
    "authority": ("", OURS, -15000, 999, "authority", ""),
    "middle": ("authority", OURS, -99, 99, "authority", ""),
    "other-authority": ("", OURS, -15000, 999, "authority", ""),
    "gone": ("authority", OURS, -99, -9, "authority", ""),
    "no-ip": ("authority", "DNS:localhost", -99, 99, "leaf", ""),
    "rsa": ("authority", OURS, -99, 99, "leaf", ""),
    "good": ("authority", OURS, -99, 99, "leaf", "0"),
    "six-days": ("authority", OURS, -1, 5, "leaf", "0"),
    "begun-in-the-20th-century": ("authority", OURS, -12000, 99, "leaf", "0"),
    "final-dot": ("authority", "DNS:LocalHost.", -99, 99, "leaf", "0"),
    "soon": ("authority", OURS, -99, 5, "leaf", "1 cert-expires-soon"),
    "expired": ("authority", OURS, -99, -9, "leaf", f"2 {CERT}expired"),
    "future": ("authority", OURS, 9, 99, "leaf", f"2 {CERT}not-yet-valid"),
    "wrong": ("authority", OTHER, -99, 99, "leaf", f"2 {CERT}name"),
    "expired-wrong": ("authority", OTHER, -99, -9, "leaf", f"2 {CERT}expired {CERT}name"),
    "localhost": ("authority", OTHER, -99, 99, "bare", f"2 {CERT}name"),  # only as CN
    "for-clients": ("authority", OURS, -99, 99, "client", f"2 {CERT}chain"),
    "stranger": ("other-authority", OURS, -99, 99, "leaf", f"2 {CERT}chain"),
    "old-stranger": ("other-authority", OURS, -12000, 99, "leaf", f"2 {CERT}chain"),
    "expired-stranger": ("other-authority", OURS, -99, -9, "leaf", f"2 {CERT}chain {CERT}expired"),
    "orphan": ("middle", OURS, -99, 99, "leaf", f"2 {CERT}chain"),  # without its intermediate
    "expired-middle": ("gone", OURS, -99, 99, "leaf", f"2 {CERT}chain"),
    "self-signed": ("", OURS, -99, 99, "leaf", f"2 {CERT}self-signed"),
    "all": ("", OTHER, -99, -9, "leaf", f"2 {CERT}expired {CERT}name {CERT}self-signed"),
}

SERVED = {name: row[5] for name, row in CERTIFICATES.items() if row[5]}


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A folder of NAME.pem (key, certificate, perhaps an intermediate one) and NAME.crt."""
    folder = tmp_path_factory.mktemp("certificates")
    (folder / "openssl.cnf").write_text(OPENSSL_CA)
    (folder / "index").write_text("")
    (folder / "serial").write_text("01\n")

    def openssl(words, san=OURS):
        settings = {"cwd": str(folder), "env": dict(os.environ, SAN=san)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(["openssl", *words.split()], **settings, **pipes)
        assert done.returncode == 0, done.stdout

    def date(days):
        return time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + days * DAY))

    openssl("ecparam -genkey -name prime256v1 -noout -out key")
    openssl("genrsa -out rsa-key 2048")
    for name, (issuer, san, begin, end, extensions, _) in CERTIFICATES.items():
        key = "rsa-key" if name == "rsa" else "key"
        openssl(f"req -new -config openssl.cnf -key {key} -subj /CN={name} -out request", san)
        words = f"-extensions {extensions} -startdate {date(begin)} -enddate {date(end)} "
        words += f"-cert {issuer}.crt" if issuer else "-selfsign"
        start = "ca -batch -notext -config openssl.cnf -in request -keyfile key"
        openssl(f"{start} -out {name}.crt {words}", san)
        sent = [key, f"{name}.crt"] + (["gone.crt"] if issuer == "gone" else [])
        (folder / f"{name}.pem").write_text("".join((folder / one).read_text() for one in sent))
    return folder


class Canned:
    """A server that answers with the same bytes, with those of the path, or as a script does.

    An answer is bytes, a dict of them by path ("": all others), or a function that gets the
    socket and the server.  PATH in the bytes is the request's.  `tls` is a cipher of TLS 1.2, or
    "client-1.2", "client-1.3": wants a certificate.
    """

    def __init__(self, certificate="", tls=""):
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.requests = []
        self.ports = {}
        self.over = threading.Event()
        self.context = None
        if certificate:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(certificate)
        if tls and tls != "client-1.3" and hasattr(ssl, "TLSVersion"):
            self.context.maximum_version = ssl.TLSVersion.TLSv1_2
        elif tls and tls != "client-1.3":
            self.context.options |= getattr(ssl, "OP_NO_TLSv1_3", 0)  # Python 3.6
        if tls.startswith("client"):
            self.context.verify_mode = ssl.CERT_REQUIRED
            self.context.load_verify_locations(certificate.replace("good.pem", "authority.crt"))
        elif tls:
            self.context.set_ciphers(tls)

    def start(self, answer):
        self.answer = answer
        self.listener.listen(50)
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                client = self.listener.accept()[0]
                threading.Thread(target=self.talk, args=(client,), daemon=True).start()

    def talk(self, sock):
        sock.settimeout(5)
        with contextlib.suppress(OSError), sock:
            # In one case plain HTTP is answered too.
            if self.context and sock.recv(1, socket.MSG_PEEK) == b"\x16":
                sock = self.context.wrap_socket(sock, server_side=True)
            with sock:
                data = sock.recv(8192)
                if data:
                    self.requests.append(data)
                    sock.sendall(self.choose(sock, data.split(b" ")[1:2] or [b""]))

    def choose(self, sock, path):
        answer = self.answer
        if callable(answer):
            answer = answer(sock, self) or b""
        elif isinstance(answer, dict):
            answer = answer.get(path[0].decode("latin-1"), answer[""])
        if b"/.well-known/" in path[0] and b"PATH" not in answer and not callable(self.answer):
            answer = says("404 Not Found")
        for name, value in {**self.ports, b"PATH": path[0]}.items():
            answer = answer.replace(name, value)
        return answer

    def close(self):
        self.over.set()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def says(status, *fields, body=""):
    lines = ("HTTP/1.1 " + status, *fields, f"Content-Length: {len(body)}", "", body)
    return "\r\n".join(lines).encode("latin-1")


def to(location, *fields, status="301 Moved"):
    return says(status, "Location: " + location, *fields)


def secure_says(*fields, body=""):
    return says("200 OK", YEAR, *fields, body=body)


def script(start, again=b"", pause=0.02):
    """An answer that begins like this, and goes on like that until the test is over."""

    def answer(sock, server):
        sock.sendall(start)
        while not server.over.wait(pause):
            sock.sendall(again)

    return answer


def reset(sock, server):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def alert(number, version=3):
    """What a TLS server sends that refuses a hello."""
    return lambda sock, server: bytes((21, 3, version, 0, 2, 2, number))


def only_upgrades(sock, server):
    wanted = b"\r\nUpgrade-Insecure-Requests: 1\r\n" in server.requests[-1]
    return SAME_PATH if wanted else PAGE


def both_on_one_port(sock, server):
    return HOME if isinstance(sock, ssl.SSLSocket) else to("https://127.0.0.1:SECUREPATH")


def if_forged(location):
    """Lead to this location if the Host is no host."""
    return lambda sock, one: to(location) if b"@forged" in one.requests[-1] else SAME_PATH


def until_cookie(cookie):
    """Set a cookie and redirect to the same URL, until it comes back."""

    def answer(sock, server):
        name = re.split("[=;]", cookie)[0].encode()
        again = to("PATH", YEAR, "Set-Cookie: " + cookie, status="302 Found")
        return HOME if b"Cookie: " + name in server.requests[-1] else again

    return answer


YEAR = "Strict-Transport-Security: max-age=31536000"
HOME = secure_says(body="mail")
P, S, IP = "http://localhost:PLAIN", "https://localhost:SECURE", "https://127.0.0.1:SECURE"
GOOD, SAME_PATH, PAGE = to(S + "/exchange"), to(S + "PATH"), says("200 OK", body="mail")
OPEN = b"HTTP/1.1 200 OK\r\n%s\r\n\r\n" % YEAR.encode()
IIS_FIELD = "Server: Microsoft-IIS/7.5"
IIS5 = says("403 Forbidden", body="<h1>The page must be viewed over a secure channel</h1>")
IIS7 = says("403 Forbidden", IIS_FIELD, body="403.4 - Forbidden: secured with Secure Sockets Layer")
IIS6 = says("403 Forbidden", IIS_FIELD, body="HTTP Error 403.6 - Forbidden")
META = '<html><head><META HTTP-EQUIV="refresh" CONTENT="0; URL=\'%s\'"></head>'
TAG = "<meta http-equiv=refresh content="
ELSEWHERE = says("200 OK", body=META % "http://127.0.0.1:PLAIN/x")
NGINX_400 = says("400 Bad Request", YEAR, body="No required SSL certificate was sent")
LONG_AGO = "expires=Thu, 01-Jan-1970 00:00:01 GMT"
DEEP = "/exchange/inbox/?cmd=contents&x=a%2Fb"
FOUND, REFRESH = "redirection-to-https", "redirection-by-refresh"
OFF_HOST, MISMATCH = "1 redirection-off-host-from-http", "2 rule-mismatch"
MISSING, NOT_FOUND = "redirection-missing", "redirects.http.does_not_exist"
FINE, MISSED = f"0 {FOUND}", f"2 {MISSING} {FOUND}"
INITIAL = "2 redirection-not-to-https-on-initial-redirection"
BACK, LAST = "redirects.insecure.subsequent", "redirection-not-to-https"
RELATIVE = f"{INITIAL} redirect-loop"
LOOP, MANY, NO_ANSWER = "redirect-loop", "redirects.too_many", "2 http-no-answer"
GARBLED, INVALID, NO_TLS = "2 http-garbled", "2 location-invalid", "2 domain.tls.cannot_connect"
NO_HSTS, INSECURE_COOKIE = "1 response.no_header", "1 cookie-without-secure"
SHORT_AGE = "1 hsts-implemented-max-age-less-than-six-months"
BELOW_1_YEAR, WANTED = "0 header.preloadable.max_age.below_1_year", "0 client-certificate-wanted"


class Case(NamedTuple):
    what: str
    expected: str  # the exit code, and the ids of all findings
    plain: Any = GOOD
    secure: Any = HOME
    certificate: str = "good"
    options: str = ""
    target: str = "localhost:PLAIN"
    tls: str = ""


PATH_80 = "--path /exchange --status 301 --https-port SECURE"
# What the redirect is, the options of the rule, and what is found.
RULED_SITES = [
    ("", FINE, GOOD),
    ("", FINE, SAME_PATH),
    ("", FINE, to(S + "/elsewhere")),
    ("", OFF_HOST, to(IP + "/exchange")),
    ("", f"{FINE} redirection-temporary", to(S + "/", status="302 Found")),
    ("--status 302", FINE, to(S + "/", status="302 Found")),
    (PATH_80, FINE, GOOD),
    ("--keep-path", FINE, SAME_PATH),
    ("--keep-path", f"{MISMATCH} {FOUND}", {"/exchange": SAME_PATH, "": GOOD}),
    ("--path /owa", MISMATCH, GOOD),
    ("--path /owa", MISSED, {"/owa": PAGE, "": to(S + "/owa")}),
    ("--path /exchange", MISMATCH, to(IP + "/exchange")),
    ("--path /", MISMATCH, says("200 OK", body=META % S)),
    ("--status 308", MISMATCH, GOOD),
    ("--https-port 444", MISMATCH, GOOD),
    ("--host 127.0.0.1", FINE, to(IP + "/exchange")),
    ("--host 127.0.0.1", MISMATCH, GOOD),
]
PLAIN = {
    "ACME's path is lost": (f"1 acme-challenge-lost {FOUND}", to(S + "/exchange?PATH")),
    "IIS 5 answers 403.4": ("2 iis-403.4", IIS5),
    "IIS 7 answers 403.4": ("2 iis-403.4", IIS7),
    "IIS answers a bare 403": ("2 iis-403.4", says("403 Forbidden", IIS_FIELD)),
    "IIS answers 403.6": (f"2 {MISSING}", IIS6),
    "any 403": (f"2 {MISSING}", says("403 Forbidden", body="<h1>Forbidden</h1>")),
    "Owahttps.asp on another port": ("2 iis-asp-port-test", says("200 OK", IIS_FIELD)),
    "200 in clear": (f"2 {MISSING}", PAGE),
    "421 in clear": (f"2 {MISSING}", says("421 Misdirected Request")),
    "304 is no redirect": (f"2 {MISSING}", says("304 Not Modified", "Location: " + S)),
    "meta refresh": (f"1 {REFRESH}", says("403 Forbidden", body=META % S)),
    "a Refresh field": (f"1 {REFRESH}", says("200 OK", "Refresh: 0;url=" + S)),
    "a Refresh field of 10 s": (f"1 {REFRESH}", says("200 OK", f"Refresh: 010.5 , {S}")),
    "a Refresh field of 11 s": (f"2 {MISSING}", says("200 OK", f"Refresh: 11; url={S}")),
    "a Refresh to javascript:": (f"2 {MISSING}", says("200 OK", "Refresh: 0; url=javascript:x")),
    "meta refresh to http": (f"2 {MISSING}", says("200 OK", body=META % P)),
    "meta refresh to http elsewhere": (f"{INITIAL} {LAST}", ELSEWHERE),
    "meta refresh without url=": (
        f"1 {REFRESH}",
        says("200 OK", body=(META % S).replace("URL=", "")),
    ),
    "meta refresh without quotes": (f"1 {REFRESH}", says("200 OK", body=f"{TAG}0;{S}>")),
    "meta refresh of 30 min": (f"2 {MISSING}", says("200 OK", body=f"{TAG}'1800;url={S}'>")),
    "meta refresh of itself": (f"2 {MISSING}", says("200 OK", body=f"{TAG}5>")),
    "meta refresh in a comment": (f"2 {MISSING}", says("200 OK", body=f"<!--{META % S}-->")),
    "meta refresh after a comment": (f"1 {REFRESH}", says("200 OK", body=f"<!---->{META % S}")),
    "meta refresh without scripts": (f"2 {MISSING}", says("200 OK", body=f"<NoScript>{META % S}")),
    "a redirect that wants Upgrade-Insecure-Requests": (FINE, only_upgrades),
    "HSTS in clear": (f"1 redirects.http.useless_header {FOUND}", to(S + "/", YEAR)),
    "a cookie in clear": (f"1 cookie-over-http {FOUND}", to(S + "/", "Set-Cookie: a=b; Secure")),
    "a cookie is deleted": (FINE, to(S + "/", "Set-Cookie: a=x; Max-Age=0")),
    "only the root redirects": (MISSED, {"/": SAME_PATH, "": PAGE}),
    "the root does not redirect": (MISSED, {"/": PAGE, "": GOOD}),
    "the deep link does not redirect": (MISSED, {DEEP: PAGE, "": SAME_PATH}),
    "itself, for ever": (f"{INITIAL} {LOOP}", to(P + "PATH")),
    "the next hop http, the last https": (INITIAL, {"/2": GOOD, "": to(P + "/2")}),
    "relative": (RELATIVE, to("/exchange")),
    "no scheme": (RELATIVE, to("//localhost:PLAIN/exchange")),
    "a redirect to nowhere": (f"{NO_TLS} {OFF_HOST[2:]}", to("https://nowhere.invalid/")),
    "the plain port": (f"{NO_TLS} location-keeps-plain-port", to("https://localhost:PLAIN")),
    "no Location": (INVALID, says("302 Found")),
    "a forged Host": (f"{FINE} host-reflected", if_forged("https://forged.invalid/x")),
    "as browsers read it": (f"{FINE} host-reflected", if_forged(r"\\x@FORGED.invalid")),
    "a forged Host in the query": (FINE, if_forged(S + "/?from=forged.invalid")),
    "two Locations": (INVALID, to(S + "/", "Location: http://evil.invalid/")),
    "two Locations, equal": (FINE, to(S + "/", "Location: " + S + "/")),
    "a NUL in the head": (GARBLED, GOOD.replace(b"Location", b"X: \0\r\nLocation")),
    "lines end in LF only": (FINE, GOOD.replace(b"\r", b"")),
    "a folded field": (FINE, GOOD.replace(b"Location: ", b"Location:\r\n  ")),
    "a blank before the colon": (FINE, GOOD.replace(b"Location:", b"Location :")),
}
# What HTTPS is where the redirect is right, and what is found besides it.
SECURE = {
    "the redirect behind a load balancer that ends TLS": (f"2 {LOOP}", to(S + "/exchange", YEAR)),
    "owahttps's 421": ("2 proxy-loop", says("421 Misdirected", YEAR, body=owahttps.LOOP)),
    "another 421": ("2 https-misdirected", says("421 Misdirected Request", YEAR)),
    "plain HTTP and back, for ever": (f"2 {BACK} {LOOP}", to(P + "/", YEAR)),
    "endless redirects": (f"2 {MANY} {LOOP}", to(S + "PATHx", YEAR)),
    "three hops": ("0", {"/exchange": to("/3", YEAR), "": HOME}),
    "four hops": (f"1 {MANY}", {"/exchange": to("3"), "/3": to("4"), "/4": to("5"), "": HOME}),
    "a relative one is right": ("0", {"/exchange": to("logon.aspx?url=x", YEAR), "": HOME}),
    "a cookie, then the same URL": ("0", until_cookie("seen=1; Secure; Path=/")),
    "no answer": (NO_TLS, None),
    "a page that is broken": ("1 https-error", says("500 Internal Server Error", YEAR)),
    "a page that stays open": ("0", script(OPEN)),
    "a page with its length that stays open": ("0", script(HOME.replace(b"200", b"400"))),
    "a Refresh to http": (f"2 {BACK} {LOOP}", secure_says(f"Refresh: 0; url={P}/")),
    "a Refresh of itself": ("0", secure_says("Refresh: 0; url=/")),
    "status 600": ("1 https-error", says("600 None", YEAR)),
    "a head without its empty line": (GARBLED, HOME[:50]),
    "one slash": ("1 location-not-a-uri", {"/exchange": to("https:/logon", YEAR), "": HOME}),
    "no HSTS": (NO_HSTS, PAGE),
    "HSTS of a month": (SHORT_AGE, HOME.replace(b"31536000", b"2592000; includeSubDomains")),
    "HSTS of 180 days": (BELOW_1_YEAR, HOME.replace(b"31536000", b"15552000")),
    "HSTS without max-age": (NO_HSTS, HOME.replace(b"max-age", b"x")),
    "HSTS with a sign": (NO_HSTS, HOME.replace(b"=", b"=-")),
    "HSTS with 5,000 digits": ("0", HOME.replace(b"=31", b"=" + b"3" * 5000)),
    "HSTS twice, equal": ("0", secure_says(YEAR)),
    "HSTS twice, of different ages": ("1 response.multiple_headers", secure_says(YEAR + "0")),
    "HSTS only on the last page": ("0", {"/exchange": to("/2"), "": HOME}),
    "a Secure with a value": ("0", secure_says("Set-Cookie: a=b; Path=/; Secure=true")),
    "a SecurE": ("0", secure_says("Set-Cookie: a=b; SecurE")),
    "a cookie named secure": (INSECURE_COOKIE, secure_says("Set-Cookie: secure=1; HttpOnly")),
    "an empty cookie": ("0", secure_says("Set-Cookie: a=; Max-Age=0", "Set-Cookie: ")),
    "a cookie without a value": (INSECURE_COOKIE, secure_says("Set-Cookie: a=")),
    "an empty cookie, then the same URL": ("0", until_cookie("seen=; Secure; Path=/")),
    "a cookie without a name": ("0", until_cookie("seen; Secure; Path=/")),
    "a cookie of another path": (f"2 {LOOP}", until_cookie("seen=1; Secure; Path=/app")),
    "a cookie that browsers refuse": (f"2 {LOOP}", until_cookie("__Host-seen=1; Path=/")),
    "a cookie of Max-Age -1": ("0", secure_says("Set-Cookie: a=x; Max-Age=-1")),
    "a cookie of long ago": ("0", secure_says("Set-Cookie: a=x; " + LONG_AGO)),
    "Max-Age is first": (INSECURE_COOKIE, secure_says("Set-Cookie: a=x; Max-Age=1; " + LONG_AGO)),
    "nginx wants a client certificate": (WANTED, NGINX_400),
    "garbage": (GARBLED, b"\x1b[2J\r\n\r\n"),
    "endless cookies": ("0", secure_says(*[f"Set-Cookie: a{n}=b; Secure" for n in range(999)])),
    "endless URLs": (f"2 {LOOP} {MANY}", lambda sock, one: to(f"/{len(one.requests)}", YEAR)),
}
CORRECTED = [
    *(S + "/a b", S + "/\xc3\xa9", S + "/\xff", S + "/<a>", S + "/\x1b[2Jx", S + "/|rm\x1b[2J|"),
    *("https:/localhost:SECURE/x", r"https://localhost:SECURE\x", r"https:\\localhost:SECURE"),
    "https://me:secret@localhost:SECURE/",
]
INVALID_LOCATIONS = [
    *("https://loc\xe4lhost/", "", "https://", "https:///", "https://a b/", "https://localhost:0/"),
    *("https://localhost:65536/", "https://localhost:x/", "https://[::1/", "https://256.1.1.1/"),
    *("https://[fe80::1%25lo]/", "https://-/", "https://..", "javascript:alert(1)"),
    *("ftp://localhost/", "file:///etc/passwd", "mailto:a@b.invalid", "https://{0.__class__}/"),
    *("https://localhost:" + "9" * 5000, "https://" + "a" * 60000, "https://" + "a." * 30000),
    "https://" + "\xc3\xbc" * 30000,
]
HTTPS, WITH_PORT = "https://localhost:SECURE/", "--https-port SECURE"
CBC, DHE = "ECDHE-ECDSA-AES128-SHA", "DHE-RSA-AES128-GCM-SHA256"
TLS_OLD, NO_HTTPS = f"1 {FOUND} tls-old", f"{NO_TLS} {FOUND}"
BY_ADDRESS = {"plain": to(IP + "/"), "target": "127.0.0.1:PLAIN"}
SECURE_COOKIE = "2 cookie-over-http redirects.http.useless_header redirection-temporary "
ONLY_HTTPS = {"plain": None, "target": HTTPS}
RULED = {"plain": None, "options": WITH_PORT}
OWA = {"plain": {"/owa?x=1": PAGE, "": SAME_PATH}, "target": "http://localhost:PLAIN/owa?x=1"}
DOWN = [{"/3": to(S + "/4"), "": to(S + "/2")}, {"/2": to(P + "/3", YEAR), "": HOME}]
ENDS_PLAIN = [{"/3": PAGE, "": to(S + "/2")}, to(P + "/3", YEAR)]
NINETEEN = [to(S + "/1"), {**{f"/{n}": to(f"/{n + 1}", YEAR) for n in range(18)}, "": HOME}]
ONE_PORT = {"plain": None, "target": "127.0.0.1:SECURE"}
OTHERS = [
    Case("the path of the target", MISSED, **OWA),
    Case("downgrade at hop 2", f"2 {FOUND} {BACK}", *DOWN),
    Case("last hop http", f"2 {FOUND} {LAST} {BACK}", *ENDS_PLAIN),
    Case("nineteen hops, which browsers follow", f"1 {FOUND} {MANY}", *NINETEEN),
    Case("a Secure cookie over http", SECURE_COOKIE + RELATIVE[2:], until_cookie("a=1; Secure")),
    Case("http and https on one port", FINE, secure=both_on_one_port, **ONE_PORT),
    Case("plain HTTP over https", NO_HTTPS, certificate=""),
    Case("only https", f"1 {NOT_FOUND}", **ONLY_HTTPS),
    Case("only https, ignored", f"0 {NOT_FOUND}", options=f"--ignore {NOT_FOUND}", **ONLY_HTTPS),
    Case("only https, which hangs up", f"{NO_ANSWER} {NOT_FOUND}", secure=b"", **ONLY_HTTPS),
    Case("only https, with a rule", NO_ANSWER, **RULED),
    Case("and back", f"{NO_ANSWER} redirects.insecure.initial", secure=to(P + "/", YEAR), **RULED),
    Case("and for ever", f"{NO_ANSWER} {LOOP}", secure=to(S + "PATH", YEAR), **RULED),
    Case("nothing at all", "2 nothing-answers", secure=None, **RULED),
    Case("a name that no DNS has", "3 host-unknown", target="nowhere.invalid"),
    Case("no IPv6 address", "3 host-unknown", target="127.0.0.1:PLAIN", options="-6"),
    Case("no IPv4 address", "3 host-unknown", target="[::1]:PLAIN", options="-4"),
    Case("a name that no DNS has, -6", "3 host-unknown", target="nowhere.invalid", options="-6"),
    Case("an IPv4 address", FINE, options="-4", **BY_ADDRESS),
    Case("asked for by address", f"2 {CERT}name {FOUND}", certificate="no-ip", **BY_ADDRESS),
    Case("nonsense", "3 target-invalid", target="a@b"),
    Case("RSA key exchange, CBC", TLS_OLD, certificate="rsa", tls="AES128-SHA"),
    Case("CBC", TLS_OLD, certificate="rsa", tls="ECDHE-RSA-AES256-SHA"),
    Case("CBC and ECDSA, which browsers do not speak", NO_HTTPS, tls=CBC),
    Case("DHE, which browsers do not speak", NO_HTTPS, certificate="rsa", tls=DHE),
    Case("TLS 1.1", f"2 {FOUND} tls-too-old", secure=alert(70, version=1), certificate=""),
    Case("no common cipher", NO_HTTPS, secure=alert(40), certificate=""),
    Case("only HTTP/2", f"3 {FOUND} https-only-http2", secure=alert(120), certificate=""),
    Case("a client certificate, TLS 1.2", f"{WANTED} {FOUND}", tls="client-1.2"),
    Case("a client certificate, TLS 1.3", f"{WANTED} {FOUND}", tls="client-1.3"),
]
OK_LINE, SHORT = b"HTTP/1.1 200 OK\r\n", "--timeout 0.1"
MOVED_LINE, HINTS = b"HTTP/1.1 301 Moved\r\n", b"HTTP/1.1 103 Early Hints\r\n\r\n"
FILLED = GOOD.replace(b"Location", b"X: " + b"y" * 100000 + b"\r\nLocation")
ODD_ANSWERS = {
    "endless headers": (GARBLED, script(OK_LINE, b"X: y\r\n" * 999, 0)),
    "one endless header": (GARBLED, script(MOVED_LINE + b"Location: https://a.b/", b"x" * 9999, 0)),
    "endless body": (f"2 {MISSING}", script(OK_LINE + b"\r\n", b"x" * 9999, 0)),
    "endless status line": (GARBLED, script(OK_LINE[:-2], b"x" * 9999, 0)),
    "a redirect that leaves the connection open": (INVALID, script(MOVED_LINE + b"\r\n")),
    "an interim answer, then the redirect": (FINE, HINTS + GOOD),
    "a head of 100 KB": (FINE, FILLED),
    "many interim answers": (GARBLED, HINTS * 2600),
    "closed at once": (NO_ANSWER, b""),
    "reset": (NO_ANSWER, reset),
    "a head without its end": (FINE, GOOD[:60]),
    "a head without its empty line": (FINE, MOVED_LINE + f"Location: {S}/\n".encode()),
    "a status line without its end": (GARBLED, MOVED_LINE[:10]),
    "status 999": (f"2 {MISSING}", says("999 Request denied")),
    "TLS on the plain port": (GARBLED, alert(70)),
    "SSH": (GARBLED, b"SSH-2.0-OpenSSH\r\n\r\n"),
    "an invalid status": (GARBLED, b"HTTP/1.1 9999999999 \x1b[31m\r\n\r\n"),
    "HTTP/0.9": (GARBLED, b"<h1>\x1b]0;owned\x07</h1>\r\n\r\n"),
    "nothing but line ends": (GARBLED, b"\r\n" * 50),
    "a meta tag without end": (f"2 {MISSING}", says("200 OK", body="<meta " * 9000)),
}
# With little time: these would take all that there is.
SLOW = {
    "a head that drips": (NO_ANSWER, script(MOVED_LINE + b"X: ", b"x")),
    "a body that drips": (f"2 {MISSING}", script(OK_LINE + b"\r\n", b"x")),
    "an interim answer, then silence": (NO_ANSWER, script(HINTS)),
    "no answer at all": (NO_ANSWER, script(b"")),
}
DRIPS = script(b"\x16\x03\x03\x40\x00", b"\x02")
SLOW_HTTPS = {"certificate": "", "options": SHORT}
SITE_CASES = [
    *OTHERS,
    *(Case(f"{rule} {found}", found, plain, options=rule) for rule, found, plain in RULED_SITES),
    *(Case(what, expected, plain) for what, (expected, plain) in PLAIN.items()),
    *(Case(what, f"{found} {FOUND}", secure=secure) for what, (found, secure) in SECURE.items()),
    *(Case(ascii(one), f"1 {FOUND} location-not-a-uri", to(one)) for one in CORRECTED),
    *(Case(ascii(one), INVALID, to(one)) for one in INVALID_LOCATIONS),
    *(Case(name, f"{found} {FOUND}", certificate=name) for name, found in SERVED.items()),
    *(Case(what, expected, plain) for what, (expected, plain) in ODD_ANSWERS.items()),
    *(Case(what, expected, plain, options=SHORT) for what, (expected, plain) in SLOW.items()),
    Case("no answer over https", f"{NO_ANSWER} {FOUND}", secure=script(b""), options=SHORT),
    Case("no handshake", NO_HTTPS, secure=script(b""), **SLOW_HTTPS),
    Case("a handshake that drips", NO_HTTPS, secure=DRIPS, **SLOW_HTTPS),
]


class Site:
    """The two servers of a case, while its `with` lasts."""

    def __init__(self, case, folder):
        pem = str(folder / f"{case.certificate}.pem") if case.certificate else ""
        self.plain, self.secure = Canned(), Canned(pem, case.tls)
        self.ports = {"PLAIN": str(self.plain.port), "SECURE": str(self.secure.port)}
        self.answers = {self.plain: case.plain, self.secure: case.secure}
        options = f"--ca-file {folder}/authority.crt --timeout 5 {case.options}"
        self.words = ["check", *self.with_ports(f"{options} {case.target}").split()]
        if "localhost" in case.target:
            self.words += ["--connect", f"127.0.0.1:{self.plain.port}"]

    def with_ports(self, text):
        for name, port in self.ports.items():
            text = text.replace(name, port)
        return text

    def __enter__(self):
        for server, answer in self.answers.items():
            server.ports = {name.encode(): port.encode() for name, port in self.ports.items()}
            if answer is not None:
                server.start(answer)
        return self

    def __exit__(self, *_):
        self.plain.close()
        self.secure.close()


def ids(report):
    return " ".join(sorted(finding["id"] for finding in report["findings"]))


REQUEST = re.compile(
    rb"GET /[!-~]* HTTP/1\.1\r\nHost: [!-~]+\r\nUser-Agent: owahttps/[0-9.]+\r\nAccept: [^\r]+\r\n"
    rb"Upgrade-Insecure-Requests: 1\r\n(Cookie: [ -~]+\r\n)?Connection: close\r\n\r\n"
)


def judge(site):
    """The report of `check --json` on this site, with its exit code; asserts what always holds."""
    code, out, err = run(*site.words, "--json")
    assert err == "" and out.count("\n") == 1
    report = json.loads(out)
    assert list(report) == ["target", "severity", "hops", "findings"]
    for hop in report["hops"]:
        assert list(hop) == ["url", "status", "location", "milliseconds", "address"]
    for finding in report["findings"]:
        assert list(finding) == ["id", "severity", "text", "urls"]
        assert re.fullmatch(r"[ -{}~]+", finding["text"])
    assert code == owahttps.EXIT_CODES[report["severity"]]
    for server in site.answers:
        assert len(server.requests) <= 4 * owahttps.MAX_HOPS + 2
        for request in server.requests:
            assert request.startswith(b"\x16") or REQUEST.fullmatch(request)
    return report, code


@needs("openssl")
@pytest.mark.parametrize("case", SITE_CASES, ids=lambda case: case.what[:50])
def test_finds(case, certificates):
    """Whatever comes: the right findings, in time, and nothing for a terminal to obey."""
    start = time.monotonic()
    with Site(case, certificates) as site:
        report, code = judge(site)
    # The exit code stays in front of the ids: digits come before letters.
    assert f"{code} {ids(report)}".split() == sorted(case.expected.split()), report["findings"]
    assert time.monotonic() - start < 4 and len(json.dumps(report)) < 80000


# ---- The check: what it reads, as browsers do ----------------------------------------

BROWSER_URLS = {
    "https://h/a b?c d#e": "https://h/a%20b?c%20d",
    "https:/h/x": "https://h/x",
    "https:h": "https://h/",
    r"https://h\x": "https://h/x",
    r"\\h\x": "http://h/x",
    "///h/x": "http://h/x",
    "https://u:p@h@i:444": "https://i:444/",
    "https://H.EXAMPLE.:443/": "https://h.example/",
    "https://b\xc3\xbccher.example:1": "https://xn--bcher-kva.example:1/",
    "https://\xd1\x80\xd1\x84:1": "https://xn--p1ai:1/",
    "https://[::1]:/": "https://[::1]/",
    "/a/./b/../c/..": "http://base/a/",
    "../../x/.": "http://base/x/",
    "?q": "http://base/a/b?q",
    "": "http://base/a/b?c",
    "#f": "http://base/a/b?c",
    "\x01 ht\ttps://h/\n": "https://h/",
    "x\xff": "http://base/a/x%FF",
    "http:y": "http://base/a/y",
    "http:/y": "http://base/y",
    r"HTTP:\y": "http://base/y",
    "http:?y": "http://base/a/b?y",
    "http:///h/y": "http://h/y",
    "http:ftp:y": "http://base/a/ftp:y",
    "1x:y": "http://base/a/1x:y",
}


@pytest.mark.parametrize("text", BROWSER_URLS)
def test_a_location_is_read_as_browsers_do(text):
    base = owahttps.Url("http", "base", 80, "/a/b?c")
    assert str(owahttps.resolve(text, base)) == BROWSER_URLS[text]


PASTED = {
    "h": "http://h/ https://h/",
    "H.:8080/owa?x=1": "http://h:8080/owa?x=1 https://h/owa?x=1",
    "https://h:8443/": "http://h/ https://h:8443/",
    "HTTP://[::1]:81": "http://[::1]:81/ https://[::1]/",
    "http://h:/x": "http://h/x https://h/x",
    "b\xfccher.example/\xfc": "http://xn--bcher-kva.example/%C3%BC "
    "https://xn--bcher-kva.example/%C3%BC",
    "stra\xdfe.example": "http://xn--strae-oqa.example/ https://xn--strae-oqa.example/",
}


@pytest.mark.parametrize("target", PASTED)
def test_a_target_is_what_people_paste(target):
    assert " ".join(map(str, owahttps.read_target(target))) == PASTED[target]


HSTS = {
    "max-age=31536000": 31536000,
    "Max-Age=0": 0,
    ' max-age = "5" ; ; includeSubDomains;;preload ': 5,
    ";max-age=1": 1,
    "max-age=" + "0" * 30 + "7": 7,
    "max-age=1" + " " * 60000: 1,
}
NO_POLICIES = [
    *("", "max-age", "max-age=", "max-age=-1", "max-age=1.5", "max-age=1abc", 'max-age="1'),
    *("max-age=1 includeSubDomains", "max-age=1,max-age=1", "max-age=1; max-age=0"),
    *("includeSubDomains; includesubdomains; max-age=1", "a;" * 30000, "a" + " " * 60000),
]


@pytest.mark.parametrize("field", [*HSTS, *NO_POLICIES], ids=lambda field: field[:40])
def test_hsts(field):
    """As browsers read it: one fault and there is none; no field of 64 KB may take long."""
    start = time.monotonic()
    hsts = owahttps.read_hsts(field)
    assert (hsts and hsts.max_age) == HSTS.get(field) and time.monotonic() - start < 1


# A Set-Cookie field, where it is set, and whether it is sent to another URL.
COOKIES = [
    ("a=b", "http://h/", "https://h/x", True),
    ("a=b", "https://h/", "https://i/", False),
    ("a=b; Domain=.H", "https://www.h/", "https://h/", True),
    ("a=b; Domain=h", "https://h/", "https://www.h/", True),
    ("a=b; Domain=www.h", "https://h/", "https://www.h/", False),
    ("a=b; Domain=h", "https://notah/", "https://h/", False),
    ("a=b; Secure", "https://h/", "https://h/", True),
    ("a=b; Secure", "https://h/", "http://h/", False),
    ("a=b; Max-Age=-1", "https://h/", "https://h/", False),
    ("a=b; Max-Age=0600", "https://h/", "https://h/", True),
    ("a=b; Max-Age=-x", "https://h/", "https://h/", True),
    ("a=b; Max-Age=-x; " + LONG_AGO, "https://h/", "https://h/", False),
    ("a=" + 4095 * "b" + "; X=" + 5000 * "x", "https://h/", "https://h/", True),
    ("a=" + 4096 * "b", "https://h/", "https://h/", False),
    ("a=b; Path=/" + 1024 * "x", "https://h/", "https://h/", True),
    ("a=b; Max-Age=60; " + LONG_AGO, "https://h/", "https://h/", True),
    ("a=b; " + LONG_AGO, "https://h/", "https://h/", False),
    ("a=b; Expires=nonsense", "https://h/", "https://h/", True),
    ("a=b\rX: y", "https://h/", "https://h/", False),
    ("a=", "https://h/", "https://h/", True),
    ("a", "https://h/", "https://h/", True),
    ("=", "https://h/", "https://h/", False),
    ("a=; Max-Age=0", "https://h/", "https://h/", False),
    ("a=b; Path=/app", "https://h/", "https://h/app?x=/", True),
    ("a=b; Path=/app", "https://h/", "https://h/app/x", True),
    ("a=b; Path=/app/", "https://h/", "https://h/app", False),
    ("a=b; Path=/app", "https://h/", "https://h/apple", False),
    ("a=b; Path=x", "https://h/app/y?z=/z", "https://h/app/", True),
    ("a=b", "https://h/app/y", "https://h/", False),
    ("a=b", "https://h/app", "https://h/x", True),
    ("__Host-a=b; Path=/; Secure", "https://h/", "https://h/", True),
    ("__Host-a=b; Path=/", "https://h/", "https://h/", False),
    ("__host-a=b; Path=/app; Secure", "https://h/", "https://h/app", False),
    ("__Host-a=b; Path=/; Secure; Domain=h", "https://h/", "https://h/", False),
    ("__Host-a=b; Path=/; Secure; Domain=", "https://h/", "https://h/", True),
    ("__Secure-a=b; Secure; Domain=h", "https://h/", "https://h/", True),
    ("__Secure-a=b", "https://h/", "https://h/", False),
    ("a=b; SameSite=None; Secure", "https://h/", "https://h/", True),
    ("a=b; SameSite=none", "https://h/", "https://h/", False),
]


@pytest.mark.parametrize("field, set_at, asked, sent", COOKIES)
def test_cookies(field, set_at, asked, sent):
    """RFC 6265, as browsers have it; no cookie may end a line of a request."""
    here, there = (owahttps.read_target(url)[url[4] == "s"] for url in (set_at, asked))
    response = owahttps.Response(200, [("set-cookie", field)], b"", True)
    cookies = owahttps.read_cookies(response, here)
    assert any(cookie.goes_to(there) for cookie in cookies) == sent


# The entries of a certificate, and whether browsers take it for this name.
NAMED = [
    ("DNS:a.h.example", "a.h.example", True),
    ("DNS:A.H.Example.", "a.h.example", True),
    ("DNS:a.h.example..", "a.h.example", False),
    ("DNS:b.h.example DNS:a.h.example", "a.h.example", True),
    ("DNS:*.h.example", "a.h.example", True),
    ("DNS:*.h.example", "a_b.h.example", True),
    ("DNS:*.H.example.", "xn--bcher-kva.h.example", True),
    ("DNS:*.h.example", "a.b.h.example", False),
    ("DNS:*.h.example", "h.example", False),
    ("DNS:*.example", "h.example", False),
    ("DNS:*", "h", False),
    ("DNS:a*.h.example DNS:*a.h.example DNS:a.*.example", "a.h.example", False),
    ("DNS:xn--*.h.example", "xn--bcher-kva.h.example", False),
    ("email:a.h.example IP Address:192.0.2.1", "a.h.example", False),
    ("IP Address:192.0.2.1", "192.0.2.1", True),
    ("DNS:192.0.2.1 DNS:*.0.2.1", "192.0.2.1", False),
    ("IP Address:2001:DB8:0:0:0:0:0:1\n", "[2001:db8::1]", True),
    ("IP Address:<invalid>", "192.0.2.1", False),
    ("", "a.h.example", False),  # the common name never counts
]


@pytest.mark.parametrize("entries, name, named", NAMED)
def test_names_of_a_certificate(entries, name, named):
    pairs = re.findall("(DNS|email|IP Address):([^ ]*)", entries)
    fields = {"subject": ((("commonName", name),),), "subjectAltName": pairs}
    assert owahttps.is_named(fields, name) == named


MANY_PARTS = [(b"X: y\n", b" a\n"), (b"Transfer-Encoding: chunked\n\n", b"1\na")]


@pytest.mark.parametrize("fields, part", MANY_PARTS, ids=["folds", "chunks"])
def test_no_response_takes_long(fields, part):
    """The time of folds and chunks must not grow with their square."""
    start = time.monotonic()
    assert owahttps.read_response(OK_LINE + fields + part * 500000 + b"\n")[0].status == 200
    assert time.monotonic() - start < 3


@needs("openssl")
def test_hsts_of_a_parent(certificates, monkeypatch):
    """www.h leads to h, whose includeSubDomains covers www.h: a note, not a warning."""
    monkeypatch.setattr(socket, "getaddrinfo", addresses_of({"www.h": [HERE4], "h": [HERE4]}))
    policy = YEAR + "; includeSubDomains"
    secure = {"/2": says("200 OK", policy), "": to("https://h:SECURE/2")}
    case = Case("", "", to("https://www.h:SECURE/"), secure, target="http://www.h:PLAIN/")
    with Site(case, certificates) as site:
        assert "hsts-from-parent" in ids(judge(site)[0])


@needs("openssl")
def test_a_server_without_secure_renegotiation(certificates):
    """RFC 5746: browsers go on without it, and so must the second handshake.

    The server is a script without cryptography, so HTTPS is not reached: what counts is the first
    record that comes back after each hello: an alert (21), and a key exchange (22).
    """
    certificate = ssl.PEM_cert_to_DER_cert((certificates / "rsa.crt").read_text())
    records = []

    def message(kind, body):
        return bytes([kind]) + struct.pack(">I", len(body))[1:] + body

    def answer(sock, server):
        chain = struct.pack(">I", len(certificate))[1:] + certificate
        hello = message(2, b"\3\3" + bytes(32) + b"\0\0\x9c\0")  # RSA, AES-128-GCM
        flight = hello + message(11, struct.pack(">I", len(chain))[1:] + chain) + message(14, b"")
        sock.sendall(b"\x16\3\3" + struct.pack(">H", len(flight)) + flight)
        records.append(sock.recv(1))

    with Site(Case("", "", GOOD, answer, certificate=""), certificates) as site:
        judge(site)
    assert sorted(records) == [b"\x15", b"\x16"]


@needs("openssl")
def test_a_machine_without_authorities(certificates, monkeypatch, tmp_path):
    """No store here: the machine is at fault, not the site; its other faults are still named."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    found = {"good": "no-authorities ", "wrong": f"no-authorities {CERT}name "}
    for certificate, expected in found.items():
        with Site(Case("", "", certificate=certificate), certificates) as site:
            site.words = ["check", *site.words[3:]]  # without --ca-file
            assert ids(judge(site)[0]) == f"{expected}{FOUND}"


@pytest.mark.parametrize("start", [OPEN, b"HTTP/1.1 301 Moved\r\n", b""])
def test_memory_is_bounded(start):
    """An endless answer must not fill the memory: check stops reading."""
    with contextlib.closing(Canned()) as server:
        server.start(script(start, b"x" * 60000, 0))
        tracemalloc.start()
        try:
            owahttps.check(f"127.0.0.1:{server.port}", seconds=2)
            assert tracemalloc.get_traced_memory()[1] < 4000000
        finally:
            tracemalloc.stop()


# ---- The check: addresses and time ---------------------------------------------------

HERE4, OTHER4, HERE6 = "127.0.0.1", "127.0.0.2", "2001:db8::1"


def addresses_of(names):
    """A getaddrinfo() that knows these names too."""
    getaddrinfo = socket.getaddrinfo

    def look_up(host, port, *rest):
        hosts = names.get(host, [host])
        return [row for one in hosts for row in getaddrinfo(one, port, *rest)]

    return look_up


def no_way_to(address, number, monkeypatch):
    """Let connections to this address, or to this port, fail."""
    create_connection = socket.create_connection

    def refuse(where, *rest):
        if address in where[:2]:
            raise OSError(number, os.strerror(number)) if number else socket.timeout()
        return create_connection(where, *rest)

    monkeypatch.setattr(socket, "create_connection", refuse)


NUMBERS = [errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNREFUSED, None]


@needs("openssl")
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("address", [OTHER4, HERE6])
def test_every_address_counts(number, address, certificates, monkeypatch):
    """An address where nothing listens must not hide behind one that answers.

    But where a whole family cannot be reached, this machine may be the reason.
    """
    monkeypatch.setattr(socket, "getaddrinfo", addresses_of({"two": [HERE4, address]}))
    no_way_to(address, number, monkeypatch)
    case = Case("", "", to("https://two:SECURE/"), target="http://two:PLAIN/", certificate="wrong")
    with Site(case, certificates) as site:
        report, _ = judge(site)
    texts = {finding["id"]: finding["text"] for finding in report["findings"]}
    of_machine = number == errno.ENETUNREACH or (address == HERE6 and number != errno.ECONNREFUSED)
    assert ("address-unreachable" in texts) == of_machine
    assert texts.get("nothing-answers", "").endswith(f" [at {address}]") != of_machine
    assert texts[CERT + "name"].endswith(" [at 127.0.0.1]")
    assert {hop["address"] for hop in report["hops"] if hop["status"]} == {HERE4}
    assert {hop["address"] for hop in report["hops"] if not hop["status"]} == {address}


@pytest.mark.parametrize("number", [errno.ENETUNREACH, errno.EAFNOSUPPORT, errno.EPERM])
def test_no_way_to_the_address(number, monkeypatch):
    """A machine without IPv6 must not call a site broken for its only address."""
    no_way_to(HERE6, number, monkeypatch)
    report = owahttps.check(f"[{HERE6}]")
    assert [finding.id for finding in report.findings] == ["address-unreachable"]
    assert report.severity == "unknown"


@needs("openssl")
def test_a_plain_port_that_hangs(certificates, monkeypatch):
    """A firewall that drops: as a port that refuses, HTTPS decides what it is."""
    with Site(Case("", "", target=HTTPS), certificates) as site:
        no_way_to(site.plain.port, None, monkeypatch)
        report, code = judge(site)
    assert (ids(report), code) == (NOT_FOUND, 1)


@pytest.mark.parametrize("asked", ["name", "connect", "answer"])
def test_a_target_is_bounded(asked, monkeypatch):
    """After one time-out nothing more is asked there; a name server that hangs is one, too."""
    over = threading.Event()
    if asked == "name":
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [over.wait(30)][:0])
    with contextlib.closing(Canned()) as server:
        server.start(script(b""))
        if asked == "connect":
            no_way_to(HERE4, None, monkeypatch)
        start = time.monotonic()
        report = owahttps.check(f"127.0.0.1:{server.port}", seconds=0.5)
        assert time.monotonic() - start < 2.5 and len(server.requests) <= 1
        assert report.severity == ("unknown" if asked == "name" else "critical")
    over.set()


def test_many_addresses_that_hang_are_cut_short(monkeypatch):
    """Six time-outs a target, however many addresses it has; and that is said."""
    hosts = [f"127.0.0.{n}" for n in range(1, 30)]
    monkeypatch.setattr(socket, "getaddrinfo", addresses_of({"many": hosts}))
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen(50)  # and nobody answers
        start = time.monotonic()
        report = owahttps.check(f"many:{listener.getsockname()[1]}", seconds=0.2)
        assert time.monotonic() - start < 3
    assert [finding.id for finding in report.findings] == ["http-no-answer", "cut-short"]
    assert "more" not in report.findings[0].text


# ---- The check: our own servers, and the command line --------------------------------


@pytest.mark.parametrize("status", [302, 308])
def test_our_listener_and_stub(status, tmp_path):
    """A temporary redirect is ours by default, and is right."""
    (tmp_path / "stub.pem").write_text(owahttps.STUB_CERTIFICATE)
    with running(owahttps.StubServer(("127.0.0.1", 0))) as stub:
        rule = RedirectRule(host="127.0.0.1", https_port=stub[1], status=status)
        with running(RedirectServer(("127.0.0.1", 0), rule=rule)) as address:
            words = ["--json", "--ca-file", str(tmp_path / "stub.pem"), f"127.0.0.1:{address[1]}"]
            code, out, _ = run("check", *words)
    report = json.loads(out)
    expected = FOUND if status == 308 else f"redirection-temporary {FOUND}"
    assert (code, report["severity"], ids(report)) == (0, "ok", expected)


@needs("openssl")
def test_our_listener_behind_a_load_balancer(certificates):
    """A load balancer that ends TLS and asks the listener again: the loop is named."""

    def relay(sock, server):
        forwarded = b"\r\nX-Forwarded-Proto: https\r\n\r\n"
        return ask(address, server.requests[-1].replace(b"\r\n\r\n", forwarded))

    with Site(Case("", "", None, relay), certificates) as site:
        rule = RedirectRule(https_port=site.secure.port, status=301)
        with running(RedirectServer(("127.0.0.1", 0), rule=rule)) as address:
            site.words[-3:] = [f"127.0.0.1:{address[1]}"]
            report, code = judge(site)
    assert (ids(report), code) == (f"proxy-loop {FOUND}", 2)


def test_our_demo_of_403_4():
    with process("demo", "--before", "--port", "0", "--https-port", "0") as child:
        port = re.findall("[0-9]+", child.stdout.readline().decode())[0]
        code, out, _ = run("check", "--timeout", "2", "127.0.0.1:" + port)
    assert code == 2 and "iis-403.4" in out and "steps 5-10 of Q279681" in out


MISSING_TEXT = "http://localhost:PLAIN/ answers 200 in the clear: redirect it to https"
QUIET_TEXT = f"critical  localhost:PLAIN: redirection-missing  {MISSING_TEXT}\n"
WHOLE_TEXT = f"""\
critical  localhost:PLAIN: {MISSING_TEXT}
 N ms  200  http://localhost:PLAIN/
 N ms  301  http://localhost:PLAIN/exchange -> https://localhost:SECURE/exchange
 N ms  200  https://localhost:SECURE/exchange
 N ms  301  http://localhost:PLAIN{DEEP} -> https://localhost:SECURE{DEEP}
 N ms  200  https://localhost:SECURE{DEEP}
  critical  redirection-missing  {MISSING_TEXT}
  ok        redirection-to-https  http://localhost:PLAIN/exchange (and 1 more) goes to \
https://localhost:SECURE/exchange
"""


@needs("openssl")
def test_text(certificates):
    """The whole output: for a person, and for cron."""
    with Site(Case("", "", {"/": PAGE, "": SAME_PATH}), certificates) as site:
        code, out, err = run(*site.words)
        assert (code, err) == (2, "")
        assert re.sub(" +[0-9]+ ms", " N ms", out) == site.with_ports(WHOLE_TEXT)
        assert run(*site.words, "--quiet") == (2, site.with_ports(QUIET_TEXT), "")
        assert run(*site.words, "--quiet", "--ignore", MISSING) == (0, "", "")


NO_FAMILY = "unknown   127.0.0.1:PLAIN: no address was found for 127.0.0.1 with -6 ("
NOTHING = (
    "critical  127.0.0.1:PLAIN: neither http://127.0.0.1:PLAIN nor https://127.0.0.1:1 answers"
)
NO_NAME = "unknown   nowhere.invalid: no address was found for nowhere.invalid ("
SILENT_TEXT = "http://localhost:PLAIN/ gave no answer within 0.1 s: look at its server\n"
LEFT_OUT = f"ok        localhost:PLAIN: nothing else was found (1 ignored: {MISSING})\n"
TWO = ["cookie-over-http", MISSING]
# The output must have this line, or begin it like this.
LINES = [
    (LEFT_OUT, Case("", "", PAGE, options=f"--ignore {MISSING}")),
    (
        f"ok        localhost:PLAIN: nothing else was found (2 ignored: {', '.join(TWO)})\n",
        Case("", "", says("200 OK", "Set-Cookie: a=b"), options=" --ignore ".join(["", *TWO])),
    ),
    (
        f" goes to https://localhost:SECURE/exchange (1 ignored: {NO_HSTS[2:]})\n",
        Case("", "", secure=PAGE, options=f"--ignore {NO_HSTS[2:]}"),
    ),
    (NO_FAMILY, Case("", "", target="127.0.0.1:PLAIN", options="-6")),
    (NO_NAME, Case("", "", target="nowhere.invalid")),
    (
        f"{NOTHING} (Connection refused): look at that host and its server\n",
        Case("", "", None, None, target="127.0.0.1:PLAIN", options="--https-port 1"),
    ),
    (SILENT_TEXT, Case("", "", script(b""), options=SHORT)),
    ("\n  and 45 more requests, which --json has\n", Case("", "", to(P + "PATHx"))),
    ("the target is invalid: 'http://' names no host\n", Case("", "", target="http://")),
]


@needs("openssl")
@pytest.mark.parametrize("line, case", LINES, ids=[line[:30] for line, _ in LINES])
def test_lines(line, case, certificates):
    with Site(case, certificates) as site:
        _, out, err = run(*site.words)
        assert site.with_ports(line) in out and err == ""


INVALID_SETTINGS = [
    ({"ignore": ["nope"]}, "'nope'"),
    ({"ignore": MISSING}, "one string"),
    ({"connect": "x:y"}, "'x:y'"),
    ({"expected": {"status": 303}}, "303"),
]


@pytest.mark.parametrize("settings, says", INVALID_SETTINGS, ids=str)
def test_invalid_settings(settings, says):
    with pytest.raises(ValueError) as caught:
        owahttps.check("localhost", **settings)
    assert says in str(caught.value)


@linux
def test_an_interrupt_ends_check_at_once():
    """Ctrl-C must never wait for what is asked and to be asked."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(99)
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        with process("check", "--timeout", "20", *[target] * 40) as child:
            silent.accept()[0].close()
            start = time.monotonic()
            child.send_signal(signal.SIGINT)
            # What a shell calls 130.
            assert child.wait(10) == -signal.SIGINT and time.monotonic() - start < 3


def test_several_targets_in_order():
    """A result comes as soon as those before it are there; the worst one decides.

    The last target answers only when the first ones have been read.
    """

    def wait_for_output(sock, server):
        server.over.wait(10)
        return IIS5

    with contextlib.closing(Canned()) as fast, contextlib.closing(Canned()) as slow:
        fast.start(IIS5)
        slow.start(wait_for_output)
        targets = [f"127.0.0.1:{fast.port}", "nowhere.invalid", "a b", f"127.0.0.1:{slow.port}"]
        with process("check", "--json", *targets) as child:
            lines = [child.stdout.readline() for _ in range(3)]
            slow.over.set()
            lines.append(child.stdout.readline())
            assert child.wait(10) == 2
    reports = [json.loads(line.decode()) for line in lines]
    assert [report["target"] for report in reports] == targets
    expected = ["iis-403.4", "host-unknown", "target-invalid", "iis-403.4"]
    assert [ids(report) for report in reports] == expected


@linux
def test_lines_fold_on_a_terminal():
    import pty

    try:
        far, near = pty.openpty()
    except OSError:
        pytest.skip("no pseudo-terminals here")
    environment = dict(os.environ, COLUMNS="50", NO_COLOR="1")
    with process("check", "nowhere.invalid", stdout=near, env=environment) as child:
        child.wait(20)
    lines = os.read(far, 9999).decode().splitlines()
    os.close(far)
    os.close(near)
    assert len(lines) > 2 and max(map(len, lines)) < 50 and lines[1].startswith(" " * 10)


def test_a_name_that_is_not_ascii_is_shown_in_both_forms(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    code, out, _ = run("check", "b\xfccher.invalid", "\u202ex")
    assert code == 3 and out.startswith("unknown   b\xfccher.invalid (xn--bcher-kva.invalid): ")
    assert "\u202e" not in out


def test_list():
    """Every finding has its id, a severity and a sentence, and --ignore takes the id."""
    code, out, err = run("check", "--list")
    assert (code, err) == (0, "") and len(out.splitlines()) == len(owahttps.SEVERITY_OF)
    for id, severity in owahttps.SEVERITY_OF.items():
        assert re.search(rf"(?m)^{severity} +{re.escape(id)}  [^|\n]+$", out)


WRONG_USAGE = [
    *("", "--nope localhost", "--timeout 0 localhost", "--timeout -1 localhost"),
    *("--timeout nan localhost", "--timeout inf localhost", "--timeout 1e99 localhost"),
    *("--path x localhost", "--status 303 localhost", "--https-port 0 localhost"),
    *("--host a:1 localhost", "--ca-file /nowhere localhost", "--ca-file /dev/null localhost"),
    *("--connect x:y localhost", "--connect ftp://x localhost", "--ignore nope localhost"),
    *("--connect h/x localhost", "--connect https://h:8443 localhost"),
]


@pytest.mark.parametrize("words", WRONG_USAGE)
def test_wrong_usage(words, monkeypatch):
    """Exit 3 and one line, before anything is asked."""
    monkeypatch.setattr(owahttps, "check", None)
    code, out, err = run("check", *words.split())
    assert (code, out) == (3, "") and re.fullmatch(r"owahttps[ -~]+\n", err)


NONSENSE = [
    "ftp://localhost/",
    "http:///",
    "/",
    "http://a@b/",
    "..",
    "localhost:0",
    "localhost:65536",
    "a \x1b[31m",
    "http://[\xe9]/",
    "http://[" + 2000 * "a" + "]/",
]


@pytest.mark.parametrize("target", NONSENSE)
def test_a_target_that_is_nonsense(target):
    """It is unknown, with nothing for a terminal to obey."""
    code, out, err = run("check", target)
    assert code == 3 and err == "" and re.fullmatch(r"[ -~\n]+", out) and "target-invalid" in out


# ---- The self-test -------------------------------------------------------------------


def red(results):
    """The cases that fail, and the level of each failure."""
    return {one.id: one.level for one in results if not one.passed}


def test_selftest_passes_in_time():
    start = time.monotonic()
    code, out, err = run("selftest")
    assert (code, err) == (0, "") and time.monotonic() - start < 5
    count = f"{out.count('ok   ')} cases: 0 unsafe, 0 against a MUST, 0 otherwise than decided"
    assert out.splitlines()[-1] == count and "\033" not in out


def test_every_case_says_what_it_is():
    """An id of its own, a reference, and for a MUST the section of the RFC."""
    for rule in owahttps.own_rules("DIR"):
        cases = owahttps.cases(rule)
        assert len({case.id for case in cases}) == len(cases) > 170
        for case in cases:
            assert re.fullmatch("[a-z0-9-]+", case.id) and case.reference and case.what
            assert case.level == owahttps.SAFE or case.right or case.field
            assert case.level != owahttps.MUST or re.match("RFC [0-9]+ [0-9.]+$", case.reference)


@pytest.mark.parametrize(
    "fields, name, path, kept, right",
    [
        ({}, "a.test", "/x?y", False, "302 https://a.test/exchange"),
        ({}, "a.test", "/x?y", True, "302 https://a.test/x?y"),
        ({"keep_path": True, "status": 308}, "a.test", "/x", False, "308 https://a.test/x"),
        ({"https_port": 8443, "path": "/owa"}, "[::1]", "/", False, "302 https://[::1]:8443/owa"),
        ({"host": "b.test"}, "a.test", "/", False, "302 https://b.test/exchange"),
        ({"allow_hosts": ["b.test"]}, "a.test", "/", False, "421"),
        ({"allow_hosts": ["b.test"]}, "b.test", "/", False, "302 https://b.test/exchange"),
    ],
)
def test_what_a_redirect_must_say(fields, name, path, kept, right):
    assert owahttps.redirect_by(RedirectRule(**fields), name, path, kept) == right


@pytest.mark.parametrize(
    "fields",
    [
        {"allow_hosts": ["mail.test"]},
        {"allow_hosts": ["mail.example.com"]},
        {"host": "mail.test", "allow_hosts": ["other.test"]},
        {"host": "mail.test", "keep_path": True, "status": 308, "https_port": 8443},
        {"health": "/status", "api": ["/v1/data", "/v2"]},
    ],
    ids=str,
)
def test_selftest_against_any_rule(fields):
    """What the cases expect follows from the rule that is named, whatever it is."""
    rule = RedirectRule(**fields)
    with running(RedirectServer(("127.0.0.1", 0), rule=rule)) as address:
        assert red(owahttps.try_cases(address, rule)) == {}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_both_servers_give_the_same_bytes(number, tmp_path):
    """The handler under the stock ThreadingHTTPServer, and our own server."""
    (tmp_path / "a-Token_1").write_text("a-Token_1.thumbprint")
    rule = owahttps.own_rules(str(tmp_path))[number]
    stock = StockServer(("127.0.0.1", 0), RedirectHandler)
    stock.rule = rule
    with running(stock) as there, listening(rule=rule) as ours:
        for case in owahttps.cases(rule):
            answers = [ask(address, case.request) for address in (there, ours.address)]
            a, b = (re.sub(rb"\nDate: [^\r]*", b"", answer) for answer in answers)
            assert a == b, case.id


class Echo(owahttps.BaseHTTPRequestHandler):
    """The plain redirect of many a program: what the client has sent is put into Location."""

    def location(self):
        return "https://" + self.headers.get("Host", "") + self.path

    def do_GET(self):
        self.send_response(302)
        self.send_header("Location", self.location())
        self.end_headers()

    def log_message(self, format, *args):
        pass


class Fixed(Echo):
    """It leads to one name, so no attack works; but it redirects what a server must refuse."""

    def location(self):
        return "https://mail.example.com/exchange"


@pytest.mark.parametrize(
    "handler, options, levels, code",
    [
        (Echo, ["--keep-path", "-k", "host"], {"safe", "must", "own"}, 1),
        (Fixed, ["--host", "mail.example.com", "-k", "host"], {"must", "own"}, 1),
        (RedirectHandler, ["--health", "/up"], {"own"}, 0),
        (RedirectHandler, [], set(), 0),
    ],
    ids=["safe", "must", "own", "none"],
)
def test_each_level_has_a_server_that_fails_it(handler, options, levels, code):
    """Against another server only an attack that works and a broken MUST fail the command."""
    server = StockServer(("127.0.0.1", 0), handler)
    server.rule = RedirectRule()
    with running(server) as (_, port):
        url = f"http://127.0.0.1:{port}"
        done, out, _ = run("selftest", "--against", url, "--json", *options)
    results = [json.loads(line) for line in out.splitlines()]
    keys = {"id", "level", "reference", "what", "expected", "got", "passed"}
    assert all(set(one) == keys for one in results)
    assert ({one["level"] for one in results if not one["passed"]}, done) == (levels, code)


OTHER_RULES = [
    (to("https://mail.example.com/exchange", status="302 Found"), "--status 308", "got 302 https"),
    (says("200 OK", body="hi"), "", "got 200, and this rule wants 302 https://mail"),
    (says("200 OK", "X: \0"), "", r"got a NUL in the head: HTTP/1.1 200 OK\x0D\x0AX: \x00"),
    (b"", "", "got closed"),
    (script(b""), "", "got no answer in time"),
]


@pytest.mark.parametrize("answer, options, says", OTHER_RULES, ids=lambda value: str(value)[:20])
def test_a_server_of_another_rule_is_one_error(answer, options, says):
    """Not 200 failures that say nothing, nor a minute of them where no answer comes."""
    start = time.monotonic()
    with contextlib.closing(Canned()) as server:
        server.start(answer)
        url = f"http://127.0.0.1:{server.port}"
        code, out, err = run("selftest", "--against", url, *options.split())
        assert len(server.requests) == 1
    assert (code, out) == (1, "") and says in err and "rule options" in err
    assert re.fullmatch(f"owahttps: error: {url}: [ -~]+\n", err) and time.monotonic() - start < 5


def test_failures_come_first_and_the_worst_of_them_at_the_top():
    server = StockServer(("127.0.0.1", 0), Echo)
    with running(server) as (_, port):
        options = ["--against", f"127.0.0.1:{port}", "--keep-path", "-k", "host"]
        _, out, _ = run("selftest", *options)
        _, quiet, _ = run("selftest", "--quiet", *options)
    words = [line.split()[0] for line in out.splitlines()]
    order = ["unsafe", "MUST", "differs", "ok"]
    assert words[:-1] == sorted(words[:-1], key=order.index) and set(order) < set(words)
    counts = [str(words.count(word)) for word in order[:3]]
    assert re.findall("[0-9]+", out.splitlines()[-1]) == [str(len(words) - 1)] + counts
    assert quiet == "".join(line for line in out.splitlines(True) if not line.startswith("ok"))
    assert all(" " <= char < "\x7f" or char == "\n" for char in out)


def test_selftest_lists_and_picks():
    assert "must  no-host: HTTP/1.1 without Host (RFC 9112 3.2)" in run("selftest", "--list")[1]
    _, out, _ = run("selftest", "--list", "-k", "health", "--health", "/up")
    assert out == "own  health: GET /up (RFC 9110 15.3.1)\n"
    _, out, _ = run("selftest", "-k", "step-18")
    assert out.startswith("ok ") and "\n2 cases: 0 unsafe" in out
    assert "\n1 case: 0 unsafe" in run("selftest", "-k", "step-18-https")[1]
    assert run("selftest", "-k", "no case has this")[0] == 2
    assert run("selftest", "--against", "https://mail.test")[0] == 2


def test_selftest_against_a_server_that_drips():
    """A byte now and then must not hold a case beyond its seconds."""
    server = Canned()
    server.start(script(b"HTTP/1.1 3", b"x"))
    start = time.monotonic()
    results = owahttps.try_cases(("127.0.0.1", server.port), RedirectRule(), "HEAD", seconds=0.2)
    assert time.monotonic() - start < 3 and all("not HTTP/1" in one.got for one in results)
    server.close()


class NoCertificate(owahttps.StubServer):
    """No certificate at all: no handshake."""

    def __init__(self, *args, **fields):
        super().__init__(*args, **fields)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)


class UntrustedCertificate(NoCertificate):
    """A certificate of its own, for the right name, that nobody trusts."""

    def __init__(self, *args, **fields):
        super().__init__(*args, **fields)
        make = "openssl req -x509 -newkey rsa:2048 -nodes -days 9 -subj /CN=localhost"
        with tempfile.TemporaryDirectory() as folder:
            pem = os.path.join(folder, "pem")
            alternative = ["-addext", "subjectAltName=DNS:localhost", "-keyout", pem, "-out", pem]
            with open(os.devnull, "w") as null:
                subprocess.check_call(make.split() + alternative, stderr=null)
            self.context.load_cert_chain(pem)


def sabotaged_rule(**wrong):
    """A RedirectRule that has these fields, whatever it is asked for."""

    class Sabotaged(RedirectRule):
        def __new__(cls, *args, **fields):
            return RedirectRule(*args, **dict(fields, **wrong))

    return Sabotaged


def no_redirect(address, rule):
    return owahttps.ThreadingServer(address, owahttps.BeforeHandler)


@pytest.mark.parametrize(
    "name, value, must_fail",
    [
        ("RedirectRule", sabotaged_rule(status=301), "step-18-redirect"),
        ("RedirectRule", sabotaged_rule(host="evil.example"), "step-18-redirect"),
        ("RedirectRule", sabotaged_rule(path="/owa"), "step-18-redirect"),
        ("StubServer", NoCertificate, "step-18-https"),
        ("StubServer", UntrustedCertificate, "step-18-https"),
        ("RedirectServer", no_redirect, "step-18-redirect"),
        ("RedirectRule.location", lambda self, name, target: f"http://{name}/exchange", "get"),
        ("RedirectRule.location", lambda self, name, target: f"https://{name}{target}", "get"),
        ("RedirectRule.keeps_path", lambda self, target: self.keep_path, "mta-sts"),
        ("RedirectRule.is_api", lambda self, path: False, "api"),
        ("server_name", lambda authority: authority, "host-userinfo"),
        ("has_body", lambda fields: False, "body"),
        ("is_loop", lambda fields: False, "loop-front-end-https"),
        ("OUTSIDE_URL", re.compile("$^"), "location-grammar"),
    ],
)
def test_sabotage_turns_the_selftest_red(monkeypatch, name, value, must_fail):
    """Each part broken on purpose: a self-test that stays green proves nothing."""
    if value is UntrustedCertificate and not shutil.which("openssl"):
        pytest.skip("needs the openssl program")
    owner, _, attribute = name.rpartition(".")
    monkeypatch.setattr(getattr(owahttps, owner) if owner else owahttps, attribute, value)
    code, out, _ = run("selftest", "-k", must_fail)
    assert code == 1 and re.search(f"(?m)^(unsafe|MUST|differs) +{must_fail}: ", out)


@pytest.mark.parametrize(
    "location, host",
    [
        ("https://evil.example", "evil.example"),
        ("HTTPS://EVIL.example:443/x", "evil.example"),
        ("https://mail.example.com@evil.example/", "evil.example"),
        ("https://mail.example.com:80\t@evil.example/", "evil.example"),
        ("https://evil.example#@mail.example.com/", "evil.example"),
        ("https://evil.example\\@mail.example.com/", "evil.example"),
        ("https:///evil.example/", "evil.example"),
        ("//evil.example/", "evil.example"),
        ("/\\evil.example/", "evil.example"),
        ("https:evil.example", "evil.example"),
        ("http:///evil.example", "evil.example"),
        ("http:/evil.example", ""),
        ("https://mail.example.com//evil.example/", "mail.example.com"),
        ("/evil.example", ""),
        ("evil.example", ""),
        # Browsers refuse these.
        ("https://mail.example.com%40evil.example/", ""),
        ("https://mail.example.com evil.example/", ""),
        ("https://[::1]/", ""),
    ],
)
def test_where_a_location_leads(location, host):
    """As Chromium follows it: tried with each failing case of nginx, HAProxy, Caddy and others."""
    assert owahttps.leads_to(location) == host


MOVED = b"HTTP/1.1 302 Found\r\nLocation: a\r\n"
WRITTEN = "302 a (a field that the request has written)"
CR = "302 a a\rb (a CR, which ends a line for some clients)"
NUL = "a NUL in the head: HTTP/1.0 301 A\r\nB: \0\r\n\r\n"
LEADS = "302 a //evil.example. (leads to evil.example)"


@pytest.mark.parametrize(
    "data, level, got",
    [
        (MOVED + b"Content-Length: 2\r\n\r\nhi", "own", "302 a"),
        (MOVED + b"\r\nhi", "own", "302 a"),
        (MOVED + b"Content-Length: 3\r\n\r\nhi", "own", "302 a (cut off)"),
        (MOVED + b"Content-Length: 0\r\n\r\nhi", "own", "302 a, not HTTP/1: hi"),
        (MOVED + b"Location: b\r\n\r\n", "own", "302 a b"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + MOVED + b"\r\n", "own", "100, 302 a"),
        (b"<h1>no</h1>", "own", "not HTTP/1: <h1>no</h1>"),
        (b"HTTP/1.0 301 A\r\nB: \0\r\n\r\n", "own", NUL),
        (MOVED[:29], "own", "a head without its end: HTTP/1.1 302 Found\r\nLocation:"),
        (b"", "own", "closed"),
        # An attack that works is unsafe, whatever the case is about.
        (MOVED + b"Evil: 1\r\n\r\n", "safe", WRITTEN),
        (MOVED + b"Location: a\rb\r\n\r\n", "safe", CR),
        (MOVED + b"Location: //evil.example.\r\n\r\n", "safe", LEADS),
    ],
)
def test_what_has_come_to_a_case(data, level, got):
    """Whatever a server under test sends is a result, never a traceback."""
    case = owahttps.case("own", "id", "reference", "what", b"", "302 a")
    result = owahttps.judge(case, *owahttps.read_answers(data, False), None)
    assert (result.level, result.passed, result.got) == (level, got == "302 a", got)


@pytest.mark.parametrize(
    "start, met",
    [
        (b"302 Found\r\nLocation: https://a.test:8443/x\r\n", "ONCE A_URI TO"),
        (b"302 Found\r\nLocation: https://u@a.test/\r\n", "ONCE A_URI"),
        (b"302 Found\r\nLocation: https://a.test/<\r\n", "ONCE TO"),
        (b"400 Bad Request\r\n", "ONCE A_URI REFUSED"),
        (b"404 Not Found\r\n", "ONCE A_URI REFUSED ACCEPTED"),
        (b"100 Continue\r\n", "A_URI"),
    ],
)
def test_what_a_must_can_ask_for(start, met):
    response = owahttps.read_response(b"HTTP/1.1 " + start + b"\r\n")[0]
    names = {"TO": "a redirect to a.test"}
    right = {names.get(one) or getattr(owahttps, one) for one in met.split()}
    assert {one for one in owahttps.demands_met(response) if "u@" not in one} == right


def test_the_readmes_count_of_cases():
    against = len(owahttps.cases(RedirectRule(keep_path=True)))
    counts = [str(len(owahttps.try_ourselves())), str(against)]
    assert re.findall("([0-9]+) cases: 0 unsafe", readme()) == counts
    assert f"documentation, with {against} cases" in readme()


# ---- The demo ------------------------------------------------------------------------


@contextlib.contextmanager
def demo(*argv, **settings):
    """Run `demo` on free ports: (process, URL of plain HTTP)."""
    ports = ["--port", str(free_port()), "--https-port", str(free_port())]
    settings = {"stderr": subprocess.DEVNULL, "universal_newlines": True, **settings}
    with process("demo", *ports, *argv, **settings) as child:
        yield child, child.stdout.readline().split()[0]
        child.terminate()
        assert child.wait(10) == 0 or os.name == "nt"  # where it is not a signal, but the end


def fetch(url, context=None):
    """Return status, Location and body of a GET."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if context else http.client.HTTPConnection
    options = {"context": context} if context else {}
    with contextlib.closing(kind("127.0.0.1", parts.port, timeout=10, **options)) as client:
        client.request("GET", url.partition(parts.netloc)[2], headers={"Host": parts.netloc})
        response = client.getresponse()
        return response.status, response.headers["Location"], response.read().decode()


def test_the_demo_tells_what_happened():
    """Its page must never tell of a redirect that was none, nor of another address."""
    trust = ssl.create_default_context(cadata=owahttps.STUB_CERTIFICATE)
    with demo() as (child, url):
        status, secure, _ = fetch(f"{url}mail?x")
        told, again = (fetch(secure, trust)[2] for _ in range(2))
        assert f"{url}mail?x<" in told and f"HTTP/1.1 302 Found\nLocation: {secure}<" in told
        assert "You typed" not in again and "302" not in again and "straight" in again
        assert child.stdout.readline() == f"http   GET /mail?x  302 {secure}\n"
        assert child.stdout.readline() == "https  GET /exchange  200 You are on HTTPS\n"
        fetch(f"{url}\x1b[31m".replace("\x1b", "%1b"))
        assert "\x1b" not in child.stdout.readline()
    with demo("--before") as (child, url):
        # A browser opens a connection ahead, and says nothing there.
        silent = connect(("127.0.0.1", urlsplit(url).port))
        status, _, page = fetch(url)
        silent.close()
        secure = re.search("<code>(https://localhost:[0-9]+/exchange)<", page).group(1)
        assert status == 403 and "HTTP 403.4 - Forbidden: SSL required" in page
        assert "302" not in fetch(secure, trust)[2]


@needs("curl")
def test_curl_follows_to_the_stub():
    """The embedded certificate is a trust anchor by the name of the file itself."""
    with demo() as (_, url):
        words = ["curl", "-4siL", "--noproxy", "*", "--cacert", SCRIPT, url]
        done = subprocess.run(words, stdout=subprocess.PIPE)
        assert done.returncode == 0 and b"You are on HTTPS" in done.stdout


CHROMIUM = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
CHROMIUM += "--disable-background-networking --disable-component-update "
CHROMIUM += "--ignore-certificate-errors --dump-dom"


@needs("chromium")
@pytest.mark.parametrize("before", (False, True))
def test_chromium_ends_on_the_page(before, tmp_path):
    with demo(*["--before"] * before) as (_, url):
        words = ["chromium", *CHROMIUM.split(), f"--user-data-dir={tmp_path}", f"{url}a?x=%22%3E"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        page = subprocess.run(words, timeout=60, **pipes).stdout.decode()
    shows = ["You are on HTTPS", "HTTP/1.1 302 Found", "/a?x=%22%3E</code>", "TLSv1.3"]
    for text in ["HTTP 403.4 - Forbidden: SSL required"] if before else shows:
        assert text in page


@pytest.mark.parametrize("host", ("0.0.0.0", "::", "192.0.2.1", "mail.example.com"))
def test_the_embedded_certificate_stays_on_loopback(host):
    """Everybody has its key: it must never serve another address."""
    with pytest.raises(RuleError) as caught:
        owahttps.StubServer((host, 0))
    assert host in str(caught.value)


# ---- The command line ----------------------------------------------------------------

ERRORS = {  # a command line: (exit code, what the one line on standard error says)
    "serve --port 70000": (2, "'70000' is not a number from 0 to 65535"),
    "serve --port x": (2, "'x'"),
    "serve --path owa": (2, "path 'owa'"),
    "serve --host a:1": (2, "'a:1' has a port"),
    "serve --status 303": (2, "303"),
    "serve --acme-dir /no/such": (2, "/no/such"),
    "serve --bind 203.0.113.9 --port 0": (1, "203.0.113.9"),
    "serve --bind bad..name --port 0": (2, "--bind 'bad..name' is not an address"),
    "serve --bind no.such.invalid --port 0": (1, "no.such.invalid"),
    "serve --user no-such-user --bind 127.0.0.1 --port 0": (1, "no-such-user"),
    "serve --prot 80": (2, "--prot"),
    "serve --https-port 80": (2, "a loop"),
    "serve --path /owa --keep-path": (2, "--keep-path"),
    "serve --max-connections -1": (2, "-1"),
    "serve --health /": (2, "health"),
    "serve --host=": (2, "empty"),
    "serve --api /": (2, "api"),
    "serve --host a --host b": (2, "--host is given twice"),
    "serve --host https://a": (2, "no https://"),
    "sevre": (2, "serve"),
    "help sevre": (2, "serve"),
    "--quiet serve": (2, "--quiet"),
    "selftest --path /x": (2, "--against"),
    "selftest --against a..b": (2, "a..b"),
    "selftest --against http://127.0.0.1:1": (1, "127.0.0.1:1: a plain GET got no connection"),
    "selftest --against http://h/foo": (2, "--against takes no path"),
    "selftest --against h/http://x": (2, "--against"),
    "selftest --against http://": (2, "'http://' names no host"),
    "demo --path /a --keep-path": (2, "--keep-path"),
    "demo --key k": (2, "--key"),
    "demo --cert /no/such": (2, "/no/such"),
    f"demo --cert {os.path.join(HERE, 'LICENSE')}": (2, "PEM"),
    "demo --host a": (2, "--host"),
}


@pytest.mark.parametrize("line", ERRORS)
def test_errors_are_one_line(line):
    code, says = ERRORS[line]
    got, out, err = run(*line.split())
    assert (got, out) == (code, "") and says in err
    assert re.fullmatch("owahttps: error: [ -~]+\n", err)


@linux
def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        code, _, err = run("serve", "--bind", "127.0.0.1", "-p", str(taken.getsockname()[1]))
    assert code == 1 and "is in use: ss -ltnp" in err
    trouble = owahttps.bind_trouble(PermissionError(13, "no"), "", 80)
    for way in ("CAP_NET_BIND", "ip_unprivileged_port_start", "--user"):
        assert way in trouble


@pytest.mark.parametrize("command", ["", *owahttps.COMMANDS])
def test_help_fits_a_screen(command):
    text = run(command, "--help")[1] if command else run("--help")[1]
    assert len(text.splitlines()) <= 50 and max(map(len, text.splitlines())) <= 80
    assert (not command or "examples:" in text) and "SUPPRESS" not in text
    assert run("help", *command.split())[1] == text and run()[1] == run("--help")[1]


def test_version():
    version = (0, f"owahttps {owahttps.__version__}\n", "")
    assert run("--version") == run("-V") == version


def test_the_help_of_python_fits_its_module():
    import pydoc

    text = pydoc.plain(pydoc.render_doc(owahttps))
    assert len(text.splitlines()) < 1400 and "class RedirectRule" in text


CLOSED = [("check a..b", 3), ("check nowhere.invalid", 3), ("generate nope", 2)]
CLOSED += [("serve --status 999", 2), ("serve --bogus", 2), ("generate --part asp", 0)]


@linux
@pytest.mark.parametrize("shell", ("exec 2>/dev/full;", "exec 2>&-;", "exec >&- 2>&-;"))
@pytest.mark.parametrize("line, code", CLOSED)
def test_exit_codes_whatever_the_standard_files_are(line, code, shell):
    """A monitor that closes standard error must never read a crash as a verdict."""
    with process(*line.split(), shell=shell) as child:
        child.communicate(timeout=30)
        assert child.returncode == code


@linux
def test_output_that_cannot_be_written():
    with process("generate", shell="exec >/dev/full;") as child:
        assert child.communicate()[1] == b"owahttps: error: No space left on device\n"
        assert child.returncode == 1
    with process("generate") as child:
        child.stdout.close()
        assert child.stderr.read() == b"" and child.wait(10) == 1


COLOURS = [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]


@pytest.mark.parametrize("environment, coloured", COLOURS)
def test_colour_is_for_terminals(environment, coloured, monkeypatch, capsys):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    owahttps.print_verdict("ok", "x")
    assert capsys.readouterr().out == "ok        x\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    owahttps.print_verdict("ok", "x")
    assert capsys.readouterr().out.startswith("\033[32mok\033[m") == coloured


FLAGS = ["-I", "-O", "-OO", "-bb", "-W error", "-X dev -W error", "-S", "-B"]


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_of_the_interpreter(flags):
    words = [sys.executable, *flags.split(), SCRIPT, "selftest", "--quiet"]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b""), done.stdout


def test_from_anywhere(tmp_path):
    """From a folder with odd letters that cannot be written; from standard input; by -m."""
    folder = tmp_path / "a b \xe9"
    folder.mkdir()
    shutil.copy(SCRIPT, str(folder))
    os.chmod(str(folder), 0o555)
    kept = ("PATH", "SYSTEMROOT", "TEMP", "TMP")
    bare = {name: value for name, value in os.environ.items() if name in kept}
    ways = [
        ([str(folder / "owahttps.py")], {"env": dict(bare, LANG="C", LC_ALL="C")}),
        (["owahttps.py"], {"cwd": str(folder), "env": dict(bare, LC_ALL="C")}),
        (["-B", "-m", "owahttps"], {"cwd": str(folder)}),
        (["-"], {"input": source().encode()}),
    ]
    try:
        for argv, settings in ways:
            words = [sys.executable, *argv, "selftest", "--quiet"]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            done = subprocess.run(words, **pipes, **settings)
            assert (done.returncode, done.stderr) == (0, b""), done.stdout
    finally:
        os.chmod(str(folder), 0o755)
    assert os.listdir(str(folder)) == ["owahttps.py"]


# ---- The text and its promises -------------------------------------------------------


def source():
    with open(SCRIPT, encoding="utf-8") as file:
        return file.read()


def readme():
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        return file.read()


def test_nothing_is_used_before_it_is_defined():
    """The file reads from top to bottom, and part one does without part two."""
    tree, defined, early = ast.parse(source()), {}, []
    for node in tree.body:
        targets = [target.id for target in getattr(node, "targets", ()) if hasattr(target, "id")]
        for name in (getattr(node, "name", None), *targets):
            defined.setdefault(name, node.lineno)
    for node in tree.body:
        own = getattr(node, "name", "")
        names = [one.id for one in ast.walk(node) if isinstance(one, ast.Name)]
        early += [(own, name) for name in names if defined.get(name, 0) > node.lineno]
    assert [pair for pair in early if pair[0] != pair[1]] == []


def test_imports_are_the_standard_librarys():
    roots = set()
    for node in ast.walk(ast.parse(source())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module.split(".")[0])
    assert roots <= getattr(sys, "stdlib_module_names", roots)  # since Python 3.10
    words = [sys.executable, "-S", "-E", "-s", "-c", "import owahttps"]  # no site-packages
    assert subprocess.run(words, cwd=HERE).returncode == 0


def test_what_is_public_is_documented():
    assert all(getattr(owahttps, name).__doc__ for name in owahttps.__all__)
    tree = ast.parse(source())
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in owahttps.__all__:
            assert ast.get_docstring(node), node.name


def options_of(command):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", run(command, "--help")[1]))


def test_the_readmes_commands_and_options_exist():
    """Each command line and option of the README is one, and it tells of each option."""
    text = readme()
    options = {command: options_of(command) for command in owahttps.COMMANDS}
    everywhere = set().union(*options.values())
    others = {"--cacert", "--version", "--now", "--webroot", "--rm", "--restart"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text))
    assert named - others <= everywhere and everywhere - {"--help"} <= named
    for line in re.findall(r"(?m)^\$ .*owahttps\.py (.*?)(?: *#.*| &| >.*)?$", text):
        words = line.split()
        assert {word for word in words if word.startswith("--")} <= options[words[0]], line


def test_the_readmes_demo_output_is_real():
    with process("demo", "--port", str(free_port()), "--https-port", str(free_port())) as child:
        lines = [child.stdout.readline(), child.stderr.readline(), child.stderr.readline()]
    ports = re.compile(r":\d{4,5}")
    for line in lines:
        shown = line.decode().strip().replace(SCRIPT, "owahttps.py")
        assert ports.sub(":PORT", shown) in ports.sub(":PORT", readme())


def test_the_readmes_python_is_real(tmp_path):
    code = re.search(r"(?s)```python\n(.*?)```", readme()).group(1)
    (tmp_path / "example.py").write_text(code)
    environment = dict(os.environ, PYTHONPATH=HERE)
    words = [sys.executable, str(tmp_path / "example.py")]
    assert subprocess.run(words, env=environment).returncode == 0


@needs("fail2ban-regex")
def test_the_readmes_fail2ban_filter(tmp_path):
    """It must match a hostile request, and never a neighbour who came to the wrong door."""
    rules = re.search(r"(?s)```ini\n(\[Definition\].*?)```", readme()).group(1)
    (tmp_path / "owahttps.conf").write_text(rules)
    heads = [get(host="a@b"), get(fields="X: a\0b\r\n"), b"\x16\x03\x01"]
    heads += [get(fields="X-Forwarded-Proto: https\r\n"), get("/api/x")]
    with serving("--api", "/api") as (child, address):
        for head in heads:
            ask(address, head)
        (tmp_path / "err.log").write_text(end(child))
    words = ["fail2ban-regex", str(tmp_path / "err.log"), str(tmp_path / "owahttps.conf")]
    done = subprocess.run(words, stdout=subprocess.PIPE)
    assert b" 2 matched" in done.stdout, done.stdout.decode()


def test_the_readme_lists_the_recipes():
    assert all(line in readme() for line in run("generate", "--list")[1].splitlines())


# ---- Other servers -------------------------------------------------------------------

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
# Each server: its programs, its main file ("": ours), its own syntax check, how it is started.
CADDY_FILE = "--adapter caddyfile --config"
PEERS = {
    "nginx": (["nginx"], NGINX, "-t -q -c", "-c"),
    "apache": (["apache2", "httpd"], APACHE, "-t -f", "-X -f"),
    "haproxy": (["haproxy"], "", "-c -q -f", "-db -f"),
    "caddy": (["caddy"], CADDY, f"validate {CADDY_FILE}", f"run {CADDY_FILE}"),
}
# The cases that a recipe's server answers otherwise than decided.
DIFFERS = {
    "nginx": """
        unknown-method lower-case-method options-asterisk expect-continue host-blanks
        host-last-label-number host-label-of-64 host-of-254 host-port-0 host-port-65536
        host-ipv6-two-gaps no-colon malformed-field-name 8-bit-field-name bell del only-lf
        http09 version-two-digits two-spaces length-huge absolute-form-https
        absolute-form-ftp target-fragment method-100000 path-encoded location-grammar
        path-outside-url path-lone-percent acme-no-token
    """,
    "apache": """
        options-asterisk host-empty-port host-label-of-64 host-of-254 folded-field http09
        http37 tls-hello length-huge coding-chunked-twice length-and-coding
        coding-http10-close absolute-form-root absolute-form-https method-100000
        path-encoded location-grammar path-outside-url path-lone-percent acme-no-token
        acme-link
    """,
    "haproxy": """
        options-asterisk permanent-for-a-day host-last-label-number host-label-of-64
        host-of-254 host-port-0 host-port-65536 host-ipv6-two-gaps two-hosts-equal
        folded-field nul bell del only-lf http2-preface http37 two-spaces tab-for-space
        pipelined length-huge length-and-coding absolute-form-no-path absolute-form-first
        absolute-form-root absolute-form-refused absolute-form-https absolute-form-ftp
        target-100000 location-grammar location-percent path-outside-url path-lone-percent
        no-host-http10-fixed
    """,
    "caddy": """
        options-asterisk host-capitals host-ipv6 host-last-label-number host-label-of-64
        host-of-254 host-port-0 host-port-65536 host-ipv6-two-gaps folded-field
        no-field-name only-lf empty-line-first tls-hello length-huge coding-chunked-twice
        length-and-coding length-and-coding-close coding-http10-close absolute-form-refused
        absolute-form-https absolute-form-ftp target-fragment target-100000 method-100000
        head-100000 path-lone-percent no-host-http10-fixed acme-no-token acme-link
    """,
}
# Requests that each recipe's server answers as serve does: target, or field of a request for /.
ALIKE = [
    *("/", "/x/y?z=%2F", "http://mail.example.com/autodiscover/a?b", "/health"),
    # Paths for machines, and what only looks like one.
    *("/autodiscover/autodiscover.xml", "/AutoDiscover/Autodiscover.XML?q=1", "/autodiscoverx"),
    *("/.well-known/mta-sts.txt", "/.Well-Known/x", "/.well-known", "/autodiscover//evil.example/"),
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
RULES = {
    "default": {},
    "keep-308": {"keep_path": True, "status": 308},
    "fixed-301": {"host": "mail.example.com", "https_port": 8443, "path": "/owa", "status": 301},
    "all": {"allow_hosts": ["mail.example.com"], "health": "/health", "api": ["/api", "/v2/y"]},
}


@contextlib.contextmanager
def peer(name, text, port, folder):
    """Run a server of the machine's own, with this recipe, on this loopback port."""
    programs, main, check, start = PEERS[name]
    if os.geteuid():
        text = re.sub(r"(?m)^    (user|group) haproxy\n", "", text)
    file, conf = os.path.join(folder, "owahttps.conf"), os.path.join(folder, "main.conf")
    with open(file, "w") as ours, open(conf, "w") as around:
        ours.write(text)
        around.write(main.format(dir=folder, port=port, file=file) or text)
    home = dict(os.environ, HOME=folder, XDG_DATA_HOME=folder, XDG_CONFIG_HOME=folder)
    quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "env": home}
    command = [find(*programs), *check.split(), conf]
    done = subprocess.run(command, stdout=subprocess.PIPE, **quiet)
    assert done.returncode == 0, done.stdout.decode()
    command = [find(*programs), *start.split(), conf]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, **quiet)

    def listens():
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) == 0

    try:
        assert wait_until(listens, 15)
        yield
    finally:
        child.terminate()
        child.wait(10)


def request_of(text):
    """Return the request for a row of ALIKE."""
    if ": " not in text:
        return get(text)
    return get(host=text[6:]) if text.startswith("Host: ") else get(fields=f"{text}\r\n")


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


@pytest.mark.parametrize("options", list(RULES))
@pytest.mark.parametrize("name", list(PEERS))
def test_servers(name, options, tmp_path, tokens):
    """Each recipe's server answers as serve does; no attack of the self-test works."""
    if not find(*PEERS[name][0]):
        pytest.skip(f"no {name} here")
    acme_dir = tokens if options == "all" and name != "haproxy" else ""
    rule = RedirectRule(acme_dir=acme_dir, **RULES[options])
    port = free_port()
    address = "127.0.0.1", port

    def find_token(token):
        return owahttps.read_token(tokens, token)

    with peer(name, owahttps.server_recipe(name, rule, port)[0].text, port, str(tmp_path)):
        for text in ALIKE:
            serve = owahttps.answer(request_of(text), rule, "", find_token)
            assert seen(ask(address, request_of(text))) == seen(serve.response), text
        if name != "haproxy":
            assert seen(ask(address, get(host="beside.example"))) == (204, None, None)
        fails = {one.id for one in owahttps.try_cases(address, rule, seconds=1) if not one.passed}
    assert fails - set(DIFFERS[name].split()) == set()
