#!/usr/bin/env python3
# /// script
# requires-python = ">=3.6"
# ///
"""owahttps: whoever types http:// lands on https://host/exchange by itself.

The cure of Microsoft's article Q279681 ("How to Force SSL Encryption for an
OWA 2000 Client") for any box: copy this one file there and run it.
It needs CPython 3.6 or newer and nothing else.

  sudo python3 owahttps.py serve --user nobody        to https://HOST/exchange
  python3 owahttps.py serve --port 8080 --keep-path   to the same path
  python3 owahttps.py generate                        the article: page, steps
  python3 owahttps.py selftest                        prove the redirect, here
  python3 owahttps.py check mail.example.com          is port 80 there right?
  python3 owahttps.py demo --open                     show it in a browser

owahttps.py COMMAND --help tells the rest.
"""
import argparse
import contextlib
import errno
import os
import re
import selectors
import signal
import socket
import ssl
import stat
import sys
import tempfile
import threading
import time
from collections import OrderedDict, deque
from email.utils import formatdate
from functools import lru_cache
from html import escape
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import AddressValueError, IPv4Address, IPv6Address, ip_address
from itertools import islice
from operator import methodcaller
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Callable, Deque, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple, Type
from urllib.parse import urljoin

__all__ = ["HostError", "RedirectHandler", "RedirectRule", "RedirectServer", "RuleError", "asp_page", "check",
           "server_name"]
__version__ = "1.0"

Address = Tuple[str, int]       # host and port, as sockets have it
Fields = Dict[str, Any]         # those of a rule or of a message, by name
Pairs = List[Tuple[str, str]]   # a field's name and its value each, or a sentence and its detail


# ---- The rule --------------------------------------------------------------------------------------------------------

class RuleError(ValueError):
    """A rule that cannot be, or that a rendering cannot express; its text is one line for the person who asked."""


class HostError(RuleError):
    """Not a server name."""


# RFC 9110 §7.2: Host = uri-host [ ":" port ].  Of RFC 3986's hosts only those that a certificate can name: labels of
# letters, digits and inner "-" and "_", or an IP address; no userinfo, no percent-encoding, no zone.
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
_OCTAL = r"(?!.*(?:[:.]0[0-9]+\.|\.0[0-9]+\]))"      # in an IPv4 address within [IPv6], Python refuses it from 3.9.5 on
_AUTHORITY = re.compile(r"(?:(?P<name>%s(?:\.%s)*)\.?|(?P<ipv6>\[%s[0-9A-Fa-f:.]+\]))(?P<port>:[0-9]{0,5})?"
                        % (_LABEL, _LABEL, _OCTAL))
# WHATWG URL §3.5: a browser takes a host whose last label is a number for an IPv4 address, and refuses a wrong one.
_ENDS_IN_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")
# RFC 3986 §2.3, unreserved characters: every server's configuration, cmd.exe and VBScript take them literally.
_PATH = re.compile(r"/[A-Za-z0-9._~/-]*")
ACME_PREFIX = "/.well-known/acme-challenge/"
# Anything else in a request target is percent-encoded, and so is a "%" that encodes nothing (RFC 3986 §3.3, §3.4).
_IN_URL = re.compile(r"[A-Za-z0-9._~:/?@!$&'()*+,;=%-]")
_ENCODED = {code: "%%%02X" % code for code in range(256) if not _IN_URL.match(chr(code))}
_LONE_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")


@lru_cache(maxsize=1024)
def server_name(authority: str) -> str:
    """The server name in a Host field: lower case, without port and trailing dot; IPv6 keeps its brackets.

    >>> server_name("Mail.Example.com.:8080")
    'mail.example.com'

    Raises HostError for anything that is not strictly a name or an address, with an optional port 1-65535.
    """
    match = _AUTHORITY.fullmatch(authority)
    if not match or not 1 <= int((match.group("port") or "")[1:] or 80) <= 65535:
        raise HostError("%a is not a server name (letters, digits, - _ ., xn-- for others, or [IPv6]; port 1-65535)"
                        % authority[:300])
    name = (match.group("name") or match.group("ipv6")).lower()
    try:
        if match.group("ipv6"):
            IPv6Address(name[1:-1])
        elif _ENDS_IN_NUMBER.fullmatch(name) and str(IPv4Address(name)) != name:    # "01" passes before Python 3.9.5
            raise AddressValueError
    except AddressValueError:
        raise HostError("%a is not an IP address" % authority) from None
    if len(name) > 253:
        raise HostError("%a is longer than a server name's 253 characters" % authority)
    return name


def _name_alone(text: str) -> str:
    """A server name that has no port beside it."""
    name = server_name(text)
    if ":" in text.rpartition("]")[2]:
        raise HostError("%a has a port: a rule's host is a name alone, see --https-port" % text)
    return name


class _RuleFields(NamedTuple):
    path: str = "/exchange"
    host: str = ""
    https_port: int = 443
    status: int = 302
    keep_path: bool = False
    allow_hosts: Tuple[str, ...] = ()
    health: str = ""
    acme_dir: str = ""


class RedirectRule(_RuleFields):
    """Where plain HTTP goes: a request for server name H goes to https://H[:https_port]path.

    path         where everyone lands; with keep_path the request's own path and query stay instead
    host         this name instead of the requested one ("": the requested one)
    status       301, 302, 307 or 308; 302 is what the article's Response.Redirect sends, and no browser keeps it
    allow_hosts  the only names that are redirected (empty: every name); host is one of them
    health       a path that answers 200 instead ("": none)
    acme_dir     a folder of ACME http-01 token files that are served instead ("": none)

    A rule that cannot be is never made: RuleError says why, in one line.
    """
    __slots__ = ()

    def __new__(cls, *args: Any, **fields: Any) -> "RedirectRule":
        rule = super().__new__(cls, *args, **fields)
        host = _name_alone(rule.host) if rule.host else ""
        allowed = [_name_alone(name) for name in rule.allow_hosts]
        if host and allowed:
            allowed.insert(0, host)
        for option, path in ("path", rule.path), ("health", rule.health or "/"):
            if not _PATH.fullmatch(path):
                raise RuleError("%s %a does not begin with '/' or has characters beside A-Z a-z 0-9 . _ ~ - /"
                                % (option, path))
        if rule.health == "/" or (rule.health == rule.path and not rule.keep_path):
            raise RuleError("--health %a is where everybody lands or begins: it takes a path of its own" % rule.health)
        if not 1 <= rule.https_port <= 65535:
            raise RuleError("https port %d is not in 1-65535" % rule.https_port)
        if rule.status not in (301, 302, 307, 308):
            raise RuleError("status %d is not one of 301, 302, 307, 308" % rule.status)
        return super().__new__(cls, **dict(rule._asdict(), host=host, allow_hosts=tuple(dict.fromkeys(allowed))))

    @classmethod
    def _make(cls, fields: Iterable[Any]) -> "RedirectRule":    # type: ignore  # _replace() goes through it
        return cls(*fields)

    def authority(self, name: str) -> str:
        """Host and port of the redirect's target, for a request for this server name."""
        return (self.host or name) + ("" if self.https_port == 443 else ":%d" % self.https_port)

    def location(self, name: str, target: str) -> str:
        """The Location for a request for this server name and request target (path and query).

        >>> RedirectRule(keep_path=True).location("mail.example.com", '/a"b?c')
        'https://mail.example.com/a%22b?c'
        """
        path = self.path
        if self.keep_path or target.startswith(ACME_PREFIX):    # a certificate authority follows to the same path alone
            path = _LONE_PERCENT.sub("%25", target).translate(_ENCODED)
        return "https://" + self.authority(name) + path


# ---- The answer ------------------------------------------------------------------------------------------------------

MAX_TARGET = 8 * 1024       # bytes of a request target: 414 beyond
MAX_HEAD = 32 * 1024        # bytes of a request head: 431 beyond
MAX_KEPT = 2 * 1024         # bytes of a head whose answer may be kept for the next one like it
MAX_LOGGED = 1000           # characters of each field of a log line
PHRASES = {200: "OK", 204: "No Content", 301: "Moved Permanently", 302: "Found", 307: "Temporary Redirect",
           308: "Permanent Redirect", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed",
           414: "URI Too Long", 421: "Misdirected Request", 431: "Request Header Fields Too Large",
           505: "HTTP Version Not Supported"}
PAGE = "<!DOCTYPE html>\n<title>%s</title>\n<h1>%s</h1>\n<p>%s\n"
MOVED = PAGE % ("Object moved", "Object moved", 'This object may be found <a href="%s">here</a>.')
NO_NAME = "not one server name and port in Host or target"
LOOP = ("redirect loop: X-Forwarded-Proto says that a proxy already speaks HTTPS and sends its traffic here; "
        "send HTTPS to the application, and plain HTTP alone to this redirect")

# RFC 9112 §2.1, §3 and §5, RFC 9110 §5.1: one empty line is tolerated before the request line, and nothing else.
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = r"(?:\r\n)?(%s{1,50}) ([!-~\x80-\xff]{1,%d}) HTTP/1\.([0-9])\r\n" % (_TOKEN[:-1], MAX_TARGET)
_HEAD = re.compile(_REQUEST_LINE + r"(?:%s:[\t -~\x80-\xff]*\r\n)*\r\n" % _TOKEN)
_FIELD = re.compile(r"\n((?i:host|connection|content-length|transfer-encoding|x-forwarded-proto|referer|user-agent))"
                    r":[\t ]*([^\r]*)")
_ABSOLUTE_FORM = re.compile(r"(?i:https?)://([^/?#]*)(.*)")
_OUTSIDE_LOG = re.compile(r'[^ !#-\[\]-~]')
# What is wrong with a head that is not _HEAD: the first that fits.
_FAULTS = [(re.compile(pattern, re.DOTALL), status, reason) for pattern, status, reason in (
    (r"\x16", 400, "TLS on the plain HTTP port"),
    (r"(?:\r\n)?(?:[^\n]{%d}|%s [^\n ]{%d})" % (MAX_TARGET + 64, _TOKEN, MAX_TARGET + 1), 414,
     "request target too long"),
    (r".{%d}" % (MAX_HEAD + 1), 431, "request head too long"),
    (r"(?:\r\n)?%s [^\r\n ]+ HTTP/(?!1\.)[0-9]+\.[0-9]+\r\n" % _TOKEN, 505, "not HTTP/1"),
    (r".*[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", 400, "control byte"),
    (r".*(?:\r(?!\n)|(?<!\r)\n)", 400, "lone CR or LF"),
    (r"(?!%s)" % _REQUEST_LINE, 400, "malformed request line"),
    (r".*\n[\t ]", 400, "folded field line"),
    (r"", 400, "malformed field line"))]
_BEGUN = re.compile((_REQUEST_LINE + r"|(?:\r\n)?[^\n]*\Z").encode("latin-1"))
_LONE_LF = re.compile(rb"(?<!\r)\n")


class Refusal(Exception):
    """A request that gets an error: Refusal(status, reason); no byte of the request is in the reason."""


class Answer(NamedTuple):
    """The response to one request head: `start`, the Date, then `rest`."""
    start: bytes        # empty: close without a word
    rest: bytes
    close: bool         # whether the connection ends after it
    unread: bool        # whether the client may still send what has to be read and dropped first
    log: str            # its line in the access log, from the request line on
    refusal: str        # why the request was refused, or ""
    token: str          # the ACME token whose file is wanted, if there is such a file


def _has_body(fields: Fields) -> bool:
    """Whether a request's fields announce a body; raises Refusal where they contradict each other (RFC 9112 §6.3)."""
    if "transfer-encoding" not in fields:
        length = fields.get("content-length", "0")
        if not re.fullmatch("[0-9]+", length):
            raise Refusal(400, "Content-Length is not one number")
        return bool(length.strip("0"))
    if "content-length" in fields:
        raise Refusal(400, "both Content-Length and Transfer-Encoding")
    codings = [coding.strip("\t ").lower() for coding in fields["transfer-encoding"].split(",")]
    if codings.count("chunked") != 1 or codings[-1] != "chunked":
        raise Refusal(400, "Transfer-Encoding does not end in chunked, once")
    return True


def _target(method: str, target: str, minor: str, fields: Fields) -> Tuple[str, str]:
    """Server name ("": none was sent) and request target (path and query, or "*"); raises Refusal or HostError."""
    if "host" not in fields and minor != "0":
        raise Refusal(400, "no Host field")
    name = server_name(fields["host"]) if "host" in fields else ""
    if method in ("CONNECT", "TRACE"):
        raise Refusal(405, "method " + method)
    absolute = _ABSOLUTE_FORM.fullmatch(target)
    if absolute:        # RFC 9112 §3.2.2: its authority goes before the Host field
        name, target = server_name(absolute.group(1)), absolute.group(2)
        target = target if target.startswith("/") else "/" + target
    if "#" in target or not (target.startswith("/") or (target == "*" and method == "OPTIONS")):
        raise Refusal(400, "request target is not a path")
    return name, target


def _decide(method: str, target: str, minor: str, fields: Fields, rule: RedirectRule,
            token_file: Optional[bytes]) -> Tuple[int, str, str, str]:
    """Status, Location, body and ACME token for a request; raises Refusal or HostError."""
    name, target = _target(method, target, minor, fields)
    path = target.partition("?")[0] if method in ("GET", "HEAD", "OPTIONS") else ""     # HAProxy's health checks
    if target == "*":
        return 204, "", "", ""
    if rule.acme_dir and path.startswith(ACME_PREFIX):
        token = path[len(ACME_PREFIX):]
        token = token if re.fullmatch("[A-Za-z0-9_-]+", token) else ""
        return (404, "", "", token) if token_file is None else (200, "", token_file.decode("latin-1"), token)
    if rule.health and path == rule.health:
        return 200, "", "OK\n", ""
    if fields.get("x-forwarded-proto", "").partition(",")[0].strip().lower() == "https":
        raise Refusal(421, LOOP)
    if not name and not rule.host:
        raise Refusal(400, "no Host field, and the redirect has no --host")
    if rule.allow_hosts and (name or rule.host) not in rule.allow_hosts:
        raise Refusal(421, "this server name is not served here")
    location = rule.location(name, target)
    return rule.status, location, MOVED % escape(location), ""


def _log_escape(text: str, most: int = MAX_LOGGED) -> str:
    """Printable ASCII without quotes and backslashes, anything else as \\xHH, as nginx writes it; at most so long."""
    return _OUTSIDE_LOG.sub(lambda match: "\\x%02X" % ord(match.group()), text[:most])[:most]


def _fields(status: int, location: str, length: int, close: bool) -> str:
    """The response's fields from the end of the Date on, and the empty line."""
    lines = "\r\nServer: owahttps\r\n"
    if location:
        lines += "Location: %s\r\n" % location
    if status in (204, 405):
        lines += "Allow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS\r\n"
    if status != 204:
        kind = "plain" if status in (200, 404) else "html"
        lines += "Content-Type: text/%s; charset=utf-8\r\nContent-Length: %d\r\n" % (kind, length)
    if close:
        lines += "Connection: close\r\n"
    return lines + "\r\n"


def answer(head: bytes, rule: RedirectRule, token_file: Optional[bytes] = None) -> Answer:
    """One request head in, one answer out; token_file holds what the ACME token asked for by the head maps to.

    The head ends in its empty line, or is the start of one that is_hopeless().  Nothing is ever decoded: the bytes of a
    Location come from the rule, from server_name() and, with keep_path, percent-encoded from the request target.
    """
    text = head.decode("latin-1")
    match = _HEAD.fullmatch(text)
    fields: Fields = {}
    for key, value in _FIELD.findall(text):     # several of one name make a list, RFC 9110 §5.3: two Hosts are no name
        key, value = key.lower(), value.rstrip("\t ")
        fields[key] = fields[key] + ", " + value if key in fields else value
    line = text.lstrip("\r\n").partition("\r\n")[0]
    location = token = refusal = ""
    try:
        if not match or len(text) > MAX_HEAD:
            raise Refusal(*next((status, reason) for fault, status, reason in _FAULTS if fault.match(text)))
        method, target, minor = match.groups()
        unread = _has_body(fields)
        close = unread or minor == "0" or "close" in fields.get("connection", "").lower()
        status, location, body, token = _decide(method, target, minor, fields, rule, token_file)
    except (Refusal, HostError) as refused:
        status, refusal = refused.args if isinstance(refused, Refusal) else (400, NO_NAME)
        close = unread = True
        title = "%d %s" % (status, PHRASES[status])
        body = PAGE % (title, title, refusal)
    rest = _fields(status, location, len(body), close)
    if line.startswith("HEAD "):
        body = ""
    log = '"%s" %d %d "%s" "%s"' % (
        _log_escape(line), status, len(body),
        _log_escape(fields.get("referer") or "-"), _log_escape(fields.get("user-agent") or "-"))
    start = "" if text.startswith("\x16") else "HTTP/1.1 %d %s\r\nDate: " % (status, PHRASES[status])
    return Answer(start.encode(), (rest + body).encode("latin-1"), close, unread, log, refusal, token)


def is_hopeless(buffer: bytes, new: int) -> bool:
    """Whether a head that is not complete is refused already; only its last `new` bytes were not looked at before."""
    if b"\n" in buffer[-new:] and (not _BEGUN.match(buffer) or _LONE_LF.search(buffer, len(buffer) - new)):
        return True
    no_line = len(buffer) > MAX_TARGET + 66 and buffer.find(b"\n", 2) < 0       # after the empty line that is tolerated
    return no_line or buffer[:1] == b"\x16" or len(buffer) > MAX_HEAD


# ---- The listener ----------------------------------------------------------------------------------------------------

class Log:
    """Lines for a file descriptor, which a thread of their own writes: a reader that stalls, a pipe that is closed or a
    disk that is full costs lines, and they are counted, but never a redirect.

    write(line) takes a str that ends in a newline; tell(text) hears of faults.
    """
    WAITING = 5000      # lines, of some 3 KB at the most; beyond, the oldest are lost
    AT_ONCE = 16        # lines that are written in one go,
    SECONDS = 0.001     # or as many as gather in this time

    def __init__(self, fd: int, tell: Callable[[str], Any]) -> None:
        self.fd, self.tell = fd, tell
        self.lines: Deque[str] = deque(maxlen=self.WAITING)
        self.taken = self.written = self.told = 0       # lines; of the access log, each is counted by one thread alone
        self._more, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        self.lines.append(line)
        self.taken += 1
        if not self._more.is_set():     # asked after the append: the thread clears it before it looks
            self._more.set()

    def _run(self) -> None:
        faulty = False
        while self.lines or not self._closing.is_set():
            if not self.lines:
                self._more.wait()
            if len(self.lines) < self.AT_ONCE:
                self._closing.wait(self.SECONDS)
            self._more.clear()
            lines = [self.lines.popleft() for _ in range(min(len(self.lines), self.AT_ONCE))]
            text = ("\n" if faulty else "") + "".join(lines)        # ends a line that was torn
            data = text.encode("ascii", "backslashreplace")
            try:
                while data:
                    data = data[os.write(self.fd, data):]
                self.written += len(lines)
                faulty = False
                self._tell_lost(self.taken - len(self.lines))
            except OSError as error:
                if not faulty:
                    self.tell("the log cannot be written, redirects go on without it: %s" % error.strerror)
                faulty = True

    def _tell_lost(self, settled: int) -> None:
        lost = settled - self.written - self.told
        if lost > 0:
            self.told += lost
            self.tell("%d lines of the log were lost" % lost)

    def close(self) -> None:
        """Write what waits, but do not wait for a reader that stalls."""
        self._closing.set()
        self._more.set()
        self._thread.join(0.5)
        self._tell_lost(self.taken)


@lru_cache(maxsize=2)
def _dates(now: int) -> Tuple[bytes, str]:
    """A second since the epoch as a Date field (RFC 9110 §5.6.7) and as an access log has it."""
    return formatdate(now, usegmt=True).encode(), time.strftime("%d/%b/%Y:%H:%M:%S %z", time.localtime(now))


def read_token(folder: str, token: str) -> Optional[bytes]:
    """The ACME token's file in this folder; None unless that is a regular file, and no link."""
    def opener(path: str, flags: int) -> int:   # should another file have taken its place: no link, no wait for a FIFO
        return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    path = os.path.join(folder, token)
    with contextlib.suppress(OSError):
        if stat.S_ISREG(os.lstat(path).st_mode):
            with open(path, "rb", opener=opener) as file:
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    return file.read(64 * 1024)
    return None


def _error_line(client: str, text: str) -> str:
    """A line for standard error with the client's address, in a form for fail2ban's <HOST>."""
    return "[%s] owahttps: %s %s\n" % (_dates(int(time.time()))[1], client, text)


class RedirectHandler(BaseHTTPRequestHandler):
    """Redirects every request of one connection, by the server's `rule`.

    On a blocking socket, as the stock ThreadingHTTPServer has it, handle() serves the connection to its end.  On the
    non-blocking ones of a RedirectServer, that calls receive(), reply() and send() by turns, as far as the bytes go.
    The server's `access_log` and `error_log`, where it has them, get lines by write(str).
    """
    rule = RedirectRule()       # for a server that has none
    head_seconds = 10.0         # for a whole request head
    idle_seconds = 15.0         # from an answer to the next request; also for a client to take its answers
    drain_seconds = 5.0         # for what the client still sends after its last answer,
    drain_at_most = 1 << 25     # bytes of it
    receive_at_once = 8192      # bytes
    answers_at_once = 32        # to pipelined requests, before it is another client's turn

    def setup(self) -> None:
        self.rule = getattr(self.server, "rule", self.rule)
        self.access_log = getattr(self.server, "access_log", None)
        self.error_log = getattr(self.server, "error_log", None)
        self.answer = getattr(self.server, "answer", answer)
        self.last = getattr(self.server, "stopping", False)     # whether no request may follow the next one
        self.client = self.address_string()
        self.buffer = self.outgoing = b""
        self.searched = 0           # how much of the buffer holds no whole head
        self.close_connection = self.unread = self.idle = self.draining = False
        self.drained = 0
        self.waits_for = selectors.EVENT_READ       # or EVENT_WRITE; 0 when it is done, and the socket may be closed
        self.registered = 0         # for which of them the selector knows it
        self.held = 0               # what its bytes count for in the server's sum
        self.deadline = time.monotonic() + self.head_seconds

    def finish(self) -> None:
        """Leave the socket to the server, which closes it when the handler `waits_for` nothing more."""

    def handle(self) -> None:
        while self.request.gettimeout() != 0 and self.waits_for and time.monotonic() < self.deadline:
            self.request.settimeout(max(0.001, self.deadline - time.monotonic()))
            self.handle_one_request()

    def handle_one_request(self) -> None:
        """Receive, answer and send once; on a blocking socket each waits for the client."""
        self.receive()
        self.reply()
        self.send()

    def receive(self) -> None:
        """Take what the client has sent; one that is gone, or too slow for a blocking socket, gets no more."""
        if self.waits_for != selectors.EVENT_READ:
            return
        try:
            data = self.request.recv(self.receive_at_once)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.unread = len(data) == self.receive_at_once     # there may be more
        if not data or self.drained > self.drain_at_most:
            self.waits_for = 0
        elif self.draining:
            self.drained += len(data)
        else:
            self.buffer += data

    def reply(self) -> None:
        """Answer what is whole in the buffer, into `outgoing`."""
        if self.outgoing or self.searched == len(self.buffer):
            return
        answers: List[bytes] = []
        while self.buffer and not self.close_connection and len(answers) < self.answers_at_once:
            end = self.buffer.find(b"\r\n\r\n", max(0, self.searched - 3)) + 4
            if end < 4:
                if not is_hopeless(self.buffer, len(self.buffer) - self.searched):
                    self.searched = len(self.buffer)
                    break
                end = len(self.buffer)
            head, self.buffer, self.searched = self.buffer[:end], self.buffer[end:], 0
            result = (self.answer if end < MAX_KEPT else answer)(head, self.rule)
            if result.token:
                result = answer(head, self.rule, read_token(self.rule.acme_dir, result.token))
            date, log_date = _dates(int(time.time()))
            if result.start:
                also = b"\r\nConnection: close" if self.last and not result.close else b""
                answers.append(result.start + date + also + result.rest)
                if self.access_log is not None:
                    self.access_log.write("%s - - [%s] %s\n" % (self.client, log_date, result.log))
            if result.refusal:
                self.log_error("refused: %s", result.refusal)
            self.close_connection = result.close or self.last
            self.unread |= result.unread or self.last
        self.outgoing = b"".join(answers)
        if answers or self.idle:
            self.idle = not self.buffer
            self.deadline = time.monotonic() + (self.idle_seconds if self.idle else self.head_seconds)

    def send(self) -> None:
        """Send what there is to send; then it is another client's turn, or this one's next request, or the end."""
        try:
            if self.outgoing:
                self.outgoing = self.outgoing[self.request.send(self.outgoing):]
        except BlockingIOError:
            pass
        except OSError:
            self.waits_for = 0
            return
        if self.close_connection and not self.outgoing and not self.draining:
            self._drain()
        elif self.waits_for:
            more = self.outgoing or self.searched < len(self.buffer)
            self.waits_for = selectors.EVENT_WRITE if more else selectors.EVENT_READ

    def _drain(self) -> None:
        """The last answer is sent; where the client may still send, to close at once would reset that answer."""
        self.draining, self.waits_for = True, 0
        if self.unread or self.buffer:
            with contextlib.suppress(OSError):
                self.request.shutdown(socket.SHUT_WR)
                self.buffer, self.searched, self.waits_for = b"", 0, selectors.EVENT_READ
                self.deadline = time.monotonic() + self.drain_seconds

    def address_string(self) -> str:
        host = str(self.client_address[0])
        return host[7:] if host.startswith("::ffff:") else host     # an IPv4 client of an IPv6 socket

    def log_error(self, format: str, *args: Any) -> None:
        if self.error_log is not None:
            self.error_log.write(_error_line(self.client, format % args))


class _HTTPServer(HTTPServer):
    """An HTTPServer for addresses of every family; host "" is all of them, in one socket where the system can."""
    # Windows would let a second server take the port of one that has SO_REUSEADDR.
    allow_reuse_address = sys.platform != "win32"

    def __init__(self, server_address: Address, *settings: Any) -> None:
        host, port = server_address
        if host == "" and socket.has_ipv6:
            try:
                self.address_family = socket.AF_INET6
                super().__init__(("::", port), *settings)
                return
            except OSError as error:
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT):
                    raise
        # In bytes: for a str, Python would load the IDNA codec, of 0.4 MB.
        info = socket.getaddrinfo((host or "0.0.0.0").encode(), port, type=socket.SOCK_STREAM)[0]
        self.address_family = info[0]
        super().__init__(info[4], *settings)    # type: ignore

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            ipv6 = getattr(socket, "IPPROTO_IPV6", 41)      # Windows has no name for it before Python 3.8
            self.socket.setsockopt(ipv6, socket.IPV6_V6ONLY, self.server_address[0] != "::")
        if sys.platform == "win32":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)       # accepted sockets inherit it
        TCPServer.server_bind(self)         # HTTPServer's asks the DNS for a name of its own, which can take seconds
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


NO_DESCRIPTOR = (errno.EMFILE, getattr(errno, "WSAEMFILE", errno.EMFILE))
OUT_OF_RESOURCES = NO_DESCRIPTOR + (errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class RedirectServer(_HTTPServer):
    """An HTTPServer for a RedirectHandler that serves all connections from one thread, with deadlines.

    server_address   (host, port); host "" is every address, IPv6 and IPv4 in one socket where the system can; port 0 is
                     a free one.  The real address is in the attribute of the same name.
    max_connections  at the cap, the connection that has waited longest makes room for a new one; beyond max_bytes too
    access_log, error_log   anything with write(str), or None

    serve_forever(), shutdown(), server_close(), handle_error() and `with` are those of socketserver, but at its end
    serve_forever() closes the socket: it runs once.  stop() is shutdown() without the wait, for a signal handler.
    """
    request_queue_size = 4096   # what Linux allows (net.core.somaxconn); others cut it to their own limit
    grace_seconds = 2.0         # after a stop, for requests that are under way
    at_once = 24                # connections that take their steps together
    max_bytes = 16 * 1024 * 1024    # of unfinished heads and unsent answers
    rule = RedirectRule()

    def __init__(self, server_address: Address, RequestHandlerClass: Type[RedirectHandler] = RedirectHandler,
                 bind_and_activate: bool = True, *, rule: RedirectRule = rule, max_connections: int = 450,
                 access_log: Optional[Any] = None, error_log: Optional[Any] = None) -> None:
        self.rule, self.max_connections, self.access_log, self.error_log = rule, max_connections, access_log, error_log
        # Who waits longest comes first; with the deadline that was set when the wait began.
        self._connections: OrderedDict[RedirectHandler, float] = OrderedDict()
        self._held = 0                              # bytes, by all of them
        self._new: List[RedirectHandler] = []       # who was accepted in this turn
        self.stopping, self._stopped = False, threading.Event()
        self._stopped.set()
        # It is pure, and monitors, load balancers and benchmarks send one head again and again.
        self.answer = lru_cache(maxsize=128)(answer)
        super().__init__(server_address, RequestHandlerClass, bind_and_activate)

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        self._stopped.clear()
        self._selector, self._next_sweep = selectors.DefaultSelector(), 0.0
        try:
            self.socket.setblocking(False)
            self._selector.register(self.socket, selectors.EVENT_READ)
            while not self.stopping:
                self._turn(poll_interval)
            self._wind_up()
        finally:
            for handler in list(self._connections):
                self._drop(handler)
            self._selector.close()
            self.stopping = False
            self._stopped.set()

    def stop(self) -> None:
        self.stopping = True

    def shutdown(self) -> None:
        self.stop()
        self._stopped.wait()

    def _wind_up(self) -> None:
        """Accept who has come so far, then no more, and let requests that are under way end."""
        all(self._accept() for _ in range(self.request_queue_size // self.at_once))
        self._selector.unregister(self.socket)
        self.socket.close()
        for handler in self._connections:
            handler.last = True
        start = now = time.monotonic()
        while self._connections and now < start + self.grace_seconds:
            self._turn(0.02)
            now = time.monotonic()
            under_way = (handler.buffer or handler.outgoing or handler.draining for handler in self._connections)
            if now > start + 0.2 and not any(under_way):        # what was sent has come by then
                break

    def _turn(self, timeout: float) -> None:
        """Wait for events, at most this many seconds, and serve them; now and then look for what is overdue."""
        now = time.monotonic()      # before it waits: what came while the process was held up is not overdue
        events = self._selector.select(max(0, min(timeout, self._next_sweep - now)))
        for start in range(0, len(events), self.at_once):
            # The listening socket has no handler; it is asked every time, as who is new does not wait for a slow crowd.
            self._serve([key.data for key, _ in events[start:start + self.at_once] if key.data])
            if not self.stopping:
                self._accept()
        if now >= self._next_sweep:
            overdue = list(islice((handler for handler in self._connections if handler.deadline < now), 64))
            self._next_sweep = now if len(overdue) == 64 else now + 0.25    # a few at a time: nobody waits for a crowd
            for handler in overdue:
                if handler.buffer.strip() and handler.waits_for == selectors.EVENT_READ:
                    handler.log_error("refused: no whole request head in time")
                self._drop(handler)

    def _accept(self) -> bool:
        """Take a few clients and serve them; whether there may be more."""
        self._new, more = [], True
        for _ in range(self.at_once):
            try:
                request, client_address = self.get_request()
            except BlockingIOError:
                more = False
                break
            except OSError as error:
                if error.errno not in OUT_OF_RESOURCES:
                    continue                # that client is gone already
                if not self._new and self._connections and error.errno in NO_DESCRIPTOR:
                    self._drop(next(iter(self._connections)))       # it gives up its own
                elif not self._new:
                    time.sleep(0.01)        # a turn without rest would spin
                    more = False
                break
            try:
                if self.verify_request(request, client_address):
                    self.process_request(request, client_address)
                else:
                    self.close_request(request)
            except Exception:
                self.handle_error(request, client_address)
                self.close_request(request)
        self._serve(self._new)
        return more

    def process_request(self, request: Any, client_address: Any) -> None:
        request.setblocking(False)
        self._new.append(self.RequestHandlerClass(request, client_address, self))       # type: ignore

    def _serve(self, handlers: List[RedirectHandler]) -> None:
        """Receive for all, then answer, then send: in turns with system calls, answer() would take twice the time."""
        for step in (methodcaller("receive"), methodcaller("reply"), methodcaller("send"), self._settle):
            for handler in handlers:
                if handler.waits_for:
                    try:
                        step(handler)
                    except Exception:
                        self.handle_error(handler.request, handler.client_address)
                        handler.waits_for = 0
        for handler in handlers:
            if not handler.waits_for:
                self._drop(handler)

    def _settle(self, handler: RedirectHandler) -> None:
        """Have the selector wait for what this handler waits for; beyond a limit, who has waited longest makes room."""
        if not handler.registered:
            self._selector.register(handler.request, handler.waits_for, handler)
        elif handler.registered != handler.waits_for:
            self._selector.modify(handler.request, handler.waits_for, handler)
        handler.registered = handler.waits_for
        if self._connections.get(handler) != handler.deadline:
            self._connections[handler] = handler.deadline
            self._connections.move_to_end(handler)
        size = len(handler.buffer) + len(handler.outgoing)
        handler.held, self._held = size, self._held + size - handler.held
        while len(self._connections) > self.max_connections or self._held > self.max_bytes:
            self._drop(next(iter(self._connections)))

    def _drop(self, handler: RedirectHandler) -> None:
        if self._connections.pop(handler, None):
            with contextlib.suppress(KeyError, ValueError):     # a handler may have closed it
                self._selector.unregister(handler.request)
        self._held -= handler.held
        handler.waits_for = handler.held = 0
        if handler.request.fileno() >= 0:
            self.close_request(handler.request)

    def handle_error(self, request: Any, client_address: Any) -> None:      # noqa: ARG002
        """One line about the exception under way; it costs that connection and nothing else."""
        with contextlib.suppress(Exception):        # a log that cannot be written does not end the server
            (sys.stderr if self.error_log is None else self.error_log).write(
                _error_line(client_address[0], "error: " + _log_escape(repr(sys.exc_info()[1]))))


# ---- Recipes ---------------------------------------------------------------------------------------------------------

class Part(NamedTuple):
    """A part of a recipe; with a file name, it is a file as well."""
    name: str
    text: str
    file: str = ""


def _refuse(who: str, *reasons: Tuple[Any, str]) -> None:
    """RuleError for the first of these (wrong, reason) that is."""
    for wrong, reason in reasons:
        if wrong:
            raise RuleError("%s %s" % (who, reason))


def _fill(template: str, marks: Iterable[str], values: Fields) -> str:
    """A template filled in; its line "+MARK|text" is for a recipe with this mark, "-MARK|text" for one without."""
    def line(match: "re.Match[str]") -> str:
        sign, mark, text = match.groups()
        return text if (sign == "+") == (mark in marks) else ""
    return re.sub(r"(?m)^([+-])([\w.]+)\|(.*\n)", line, template).format(**values)


ASP_PAGE = """\
<%
      If Request.ServerVariables("SERVER_PORT")={http_port} Then
         Dim strSecureURL
         strSecureURL = "https://"
         strSecureURL = strSecureURL & {server_name}
         strSecureURL = strSecureURL & "{path}"
         Response.Redirect strSecureURL
      End If
   %>
"""


def asp_page(rule: RedirectRule, http_port: int = 80) -> str:
    """The article's Owahttps.asp for this rule, to the letter for the default one; RuleError where there is none."""
    _refuse("the ASP page cannot express",
            (rule.keep_path, "--keep-path: IIS hands it a decoded URL, which cannot be made whole again"),
            (rule.status != 302, "--status %d: Response.Redirect sends 302" % rule.status),
            (rule.allow_hosts, "--allow-host: it has no list of names; use --host"),
            (rule.health or rule.acme_dir, "--health and --acme-dir: it is run for one folder alone"))
    name = '"%s"' % rule.host if rule.host else 'Request.ServerVariables("SERVER_NAME")'
    return ASP_PAGE.format(http_port=http_port, server_name=name, path=rule.authority("")[len(rule.host):] + rule.path)


def options(rule: RedirectRule) -> str:
    """The rule as command line options, each with a space before it."""
    words = ""
    for field, value, default in zip(rule._fields, rule, RedirectRule()):
        option = " --" + field.replace("hosts", "host").replace("_", "-")
        if value is True:
            words += option
        elif value != default:
            words += "".join("%s %s" % (option, one) for one in (value if isinstance(value, tuple) else [value]))
    return words


# Exchange: what it is, and the marks of its templates' lines; its name and the method are marks too.
EXCHANGE = {"exchange2000": ("Exchange 2000 on IIS 5.0: Microsoft's article Q279681", "article"),
            "exchange2003": ("Exchange 2003 on IIS 6.0", "article iis6"),
            "exchange2007": ("Exchange 2007 on IIS 7.0", "until2013"),
            "exchange2010": ("Exchange 2010 on IIS 7.5 or 8.0", "until2013"),
            "exchange2013": ("Exchange 2013 on IIS 7.5 to 8.5", "until2013"),
            "exchange2016": ("Exchange 2016 on IIS 8.0 to 10", "since2016"),
            "exchange2019": ("Exchange 2019 on IIS 10", "since2016"),
            "exchange-se": ("Exchange SE on IIS 10", "since2016")}
ABOUT = """\
+article|The error 403.4 of the {folder} folder runs an ASP page, which redirects to {url}
+article| - On any port but {http_port} the page does nothing: an empty page with status 200 (see --http-port).
+article| - SERVER_NAME is what the user typed, and the certificate may not name it: --host fixes the name.
+article| - Deep links are lost: everybody lands on {path}. A form that was posted has crossed the wire in clear.
+article| - Without a certificate on the site, Require secure channel answers 403 to everything.
+article| - Let's Encrypt follows a redirect only to the same path: this one breaks its http-01 renewal.
+article| - Exchange copies settings from Active Directory over the metabase (KB 294280): test again after 15 minutes.
+article| - Not behind a load balancer that ends TLS: all requests come to port {http_port}, and are redirected forever.
+article| - The script and its undo were never run on Windows: read them first.
+iis6| - The page must run in the application pool of the Exchange folder, else IIS answers 403.18 (KB 842429).
+iis6| - On a single server, requiring SSL on /Exchange breaks ActiveSync and OMA (KB 817379): read that first.
+redirect|The root of Default Web Site redirects to {url}
+redirect|Its virtual directories do not. The name of a file right below the root is appended to it.
+403.4|Require SSL stays on, and its error 403.4 leads to {url}
+403.4|A browser on the server itself is shown a detailed error instead: test from another machine.
-article| - Not where TLS ends before this server: redirect there. Never on the site "Exchange Back End".
-article| - Nobody has run these scripts on Windows yet: read them first.
 - Click the steps or run owahttps.cmd, not both. owahttps-undo.cmd takes back the script, not the clicks.
+exchange2007| - Response mode Redirect crashes OWAAppPool on this version: method 403.4 serves a file with a refresh.
+exchange2007|   Its status stays 403: a browser follows it, but owahttps.py check reports the 403.
+until2013| - Method redirect serves the bare host name: http://HOST/owa may still answer 403.4. Method 403.4 does both.
+since2016| - Method 403.4 needs CustomErrorModule, which web.config in the site's directory removes: delete its line
+since2016|   <remove name="CustomErrorModule" /> (keep a copy), and look again after every cumulative update.
+since2016| - Under Extended Protection (on by default from Exchange 2019 CU14) /owa keeps Require SSL: with method
+since2016|   redirect, http://HOST/owa then answers 403.4. Method 403.4 does both.
+308| - Status 308 needs IIS 10.
"""
STEPS = {
    "article": """\
 1. Save the ASP page as Owahttps.asp in the folder Inetpub\\Wwwroot\\Owaasp (make the folder).
    Copy it as it is: SERVER_PORT and SERVER_NAME are variables that IIS fills in, not places for your own values.
 2. Open Internet Service Manager.
 3. Expand (double-click) the name of the computer.
 4. Expand Default Web Site.
 5. Right-click the {folder} folder and click Properties.
 6. Click the Custom Errors tab.
 7. Double-click the 403.4 error code (listed as 403;4).
 8. In the Message Type list, select URL.
 9. In the URL field, type /owaasp/owahttps.asp
10. Click OK.
11. Click the Directory Security tab.
12. Under Secure Communications, click Edit.
13. Select the Require secure channel (SSL) check box (and Require 128-bit encryption, if clients must have it).
    Only the {folder} folder needs this setting for OWA to require SSL. Wherever else you set it, the OWAasp folder must
    stay without it, since the page is asked for over plain HTTP.
14. Click OK.
15. Click OK.
16. At a command prompt, type: net stop iisadmin /y   (or restart the server instead)
    Note which services it stops: with Exchange 2000, all Exchange services stop together with IIS.
17. Start every service that was stopped.
18. Test: http://HOST{colon_port}{path} must land on {url}
+iis6|    On IIS 6.0 (labels not verified): the site is below Web Sites; under Web Service Extensions, allow Active
+iis6|    Server Pages; make Owaasp an application in the application pool that the {folder} folder uses.
""",
    "redirect": """\
 1. Internet Information Services (IIS) Manager: expand the server and Sites, select Default Web Site, Features View.
 2. SSL Settings: note what is set here and on every virtual directory. Here only: clear Require SSL; Actions: Apply.
+since2016| 3. Every virtual directory that had it except owa (under Extended Protection, owa too), and what had it
+since2016|    below owa (auth, Integrated, oma): SSL Settings, select Require SSL, Apply.
-since2016| 3. Every virtual directory that had it: SSL Settings, select Require SSL, Apply.
 4. Default Web Site, HTTP Redirect (role service HTTP Redirection): select "Redirect requests to this destination",
    enter {url}
    select "Only redirect requests to content in this directory (not subdirectories)";
    Status code: the entry with {status}; Apply.
 5. At once, every virtual directory, PowerShell and Rpc too: HTTP Redirect, clear "Only redirect requests to content in
    this directory (not subdirectories)" and "Redirect requests to this destination", Apply.
 6. Select the server; Actions: Restart.
    To take it back: clear the redirect of step 4, then set the SSL settings as noted in step 2; Restart.
""",
    "403.4": """\
 1. Internet Information Services (IIS) Manager: expand the server and Sites, select Default Web Site, Features View.
 2. SSL Settings, here and on owa: Require SSL is selected.
+exchange2007| 3. Default Web Site, Error Pages; Actions: Add...; Status code: 403.4; Response Action:
+exchange2007|    "Insert content from static file into the error response", %windir%\\owahttps\\owahttps.htm
+exchange2007|    (a file that you make: <meta http-equiv="refresh" content="0;url={url}">)
-exchange2007| 3. Default Web Site, Error Pages; Actions: Add...; Status code: 403.4; Response Action:
-exchange2007|    "Respond with a 302 redirect", {url}
    OK.  To take it back: remove this entry.
"""}
CMD = """\
@echo off
rem {what}, method {method}: {url}
rem Nobody has run this on Windows yet: read it first. Run it on the server, in a Command Prompt as administrator.
setlocal
set "KEEP=%windir%\\owahttps"
set "FAILED="
-article|set "APPCMD=%windir%\\system32\\inetsrv\\appcmd.exe"
-article|set "SITE=Default Web Site"
"""
BEGIN_7 = CMD + """\
+redirect|set "MODULE=HttpRedirectionModule"
+redirect|set "SECTION=system.webServer/httpRedirect"
+redirect|set "PRESENT=enabled=.true."
+403.4|set "MODULE=CustomErrorModule"
+403.4|set "SECTION=system.webServer/httpErrors"
+403.4|set "PRESENT=statusCode=.403. subStatusCode=.4."
%APPCMD% list modules /app.name:"%SITE%/" | findstr /l /c:"%MODULE%" >nul
if errorlevel 1 echo %MODULE% is not loaded for %SITE%.& exit /b 1
%APPCMD% list config "%SITE%" -section:%SECTION% | findstr /i /r /c:"%PRESENT%"
if not errorlevel 1 echo %SITE% has this already: undo that first, where it was set.& exit /b 1
if not exist "%KEEP%" md "%KEEP%"
rem For the last resort, appcmd restore backup "NAME", which takes back later changes too.
%APPCMD% add backup || goto fail
"""
END_7 = """\
%APPCMD% list config "%SITE%" -section:%SECTION% | findstr /i /r /c:"%PRESENT%" >nul
if errorlevel 1 echo Not in effect: a web.config in the directory of %SITE% overrides it.& exit /b 1
echo Done. Test it from another machine. owahttps-undo.cmd takes it back.
exit /b 0
:fail
echo Stopped half-way. The undo script takes back what was set.
exit /b 1
"""
# IIS 5 and 6: not iisreset, which can lose metabase changes (Q286196).
RESTART = """\
net start > "%KEEP%\\services.txt"
net stop iisadmin /y
for /f "tokens=*" %%S in ('findstr /b /c:"   " "%KEEP%\\services.txt"') do net start "%%S" >nul 2>&1
net start > "%KEEP%\\after.txt"
for /f "tokens=*" %%S in ('findstr /b /c:"   " "%KEEP%\\services.txt"') do findstr /l /x /c:"   %%S" \
"%KEEP%\\after.txt" >nul || (echo NOT started again: %%S& set "FAILED=1")
if defined FAILED exit /b 1
"""
SCRIPT = {
    "redirect": BEGIN_7 + """\
if exist "%KEEP%\\sslflags.txt" echo %KEEP%\\sslflags.txt is there: run the undo script first.& exit /b 1
%APPCMD% list vdir /text:vdir.name | findstr /b /i /l /c:"%SITE%/" > "%KEEP%\\vdirs.txt" || goto fail
rem Two plain directories, which are not in that list.
for %%D in (aspnet_client owa/auth) do >>"%KEEP%\\vdirs.txt" echo %SITE%/%%D
for /f "usebackq delims=" %%V in ("%KEEP%\\vdirs.txt") do set "V=%%V"& call :keep || goto fail
%APPCMD% set config "%SITE%" -section:access -sslFlags:None -commit:apphost || goto fail
+since2016|rem Reached by plain HTTP, /owa redirects by itself. Under Extended Protection it must not be reached so.
+since2016|%APPCMD% list config "%SITE%/owa" -section:system.webServer/security/authentication/windowsAuthentication \
| findstr /i /r "tokenChecking=.Allow. tokenChecking=.Require."
+since2016|if errorlevel 1 %APPCMD% set config "%SITE%/owa" -section:access -sslFlags:None -commit:apphost || goto fail
%APPCMD% set config "%SITE%" -section:httpRedirect -enabled:true -destination:"{url}" \
-childOnly:true -httpResponseStatus:{status_name} -commit:apphost || goto fail
iisreset /noforce
""" + END_7 + """\
rem Nail down the SSL settings a directory has now, and no redirect: then it inherits neither from the root.
:keep
if "%V:~-1%"=="/" set "V=%V:~0,-1%"
set "F="
for /f tokens^=1-4^ delims^=^" %%A in ('%APPCMD% list config "%V%" -section:access ^| findstr sslFlags') do \
if "%%C"==" sslFlags=" (set "F=%%D") else set "F=%%B"
if not defined F echo The SSL settings of "%V%" cannot be read.& exit /b 1
set "F=%F: =%"
echo "%V%": %F%
>>"%KEEP%\\sslflags.txt" echo %F%*"%V%"
if /i "%V%"=="%SITE%" exit /b 0
%APPCMD% set config "%V%" -section:access -sslFlags:%F% -commit:apphost || exit /b 1
%APPCMD% list config "%V%" -section:system.webServer/httpRedirect | findstr /i /r "enabled=.true." >nul
if not errorlevel 1 echo "%V%" has a redirect of its own: left alone.& exit /b 0
%APPCMD% set config "%V%" -section:httpRedirect -enabled:false -destination:"" -childOnly:false -commit:apphost
exit /b
""",
    "403.4": BEGIN_7 + """\
for %%P in ("%SITE%" "%SITE%/owa") do %APPCMD% list config %%P -section:access | findstr Ssl || \
echo %%P does not require SSL: it will not answer 403.4.
+exchange2007|>"%KEEP%\\owahttps.htm" echo ^<meta http-equiv="refresh" content="0;url={url}"^>\
^<a href="{url}"^>{url}^</a^>
+exchange2007|set "PAGE=path='%KEEP%\\owahttps.htm',responseMode='File'"
-exchange2007|set "PAGE=path='{url}',responseMode='Redirect'"
%APPCMD% set config "%SITE%" -section:%SECTION% /+"[statusCode='403',subStatusCode='4',%PAGE%]" /commit:apphost \
|| goto fail
>"%KEEP%\\403-4.txt" echo %PAGE%
""" + END_7,
    "article": CMD + """\
if exist "%KEEP%\\before.txt" echo %KEEP%\\before.txt is there: run the undo script first.& exit /b 1
if not exist "%KEEP%" md "%KEEP%"
rem The lines below that begin with ::v] are a VBScript, those with ::a] the page.
type nul > "%KEEP%\\metabase.vbs"
type nul > "%KEEP%\\page.asp"
for /f "tokens=1,* delims=]" %%A in ('findstr /b /l /c:"::v]" "%~f0"') do >>"%KEEP%\\metabase.vbs" echo %%B
for /f "tokens=1,* delims=]" %%A in ('findstr /b /l /c:"::a]" "%~f0"') do >>"%KEEP%\\page.asp" echo %%B
cscript //nologo "%KEEP%\\metabase.vbs" set "%KEEP%\\page.asp" > "%KEEP%\\before.txt"
type "%KEEP%\\before.txt"
findstr /b /c:"AccessSSL=" "%KEEP%\\before.txt" >nul || (del "%KEEP%\\before.txt"& exit /b 1)
findstr /x /c:"done" "%KEEP%\\before.txt" >nul || exit /b 1
+iis6|cscript //nologo %windir%\\system32\\iisext.vbs /EnFile %windir%\\system32\\inetsrv\\asp.dll
""" + RESTART + """\
exit /b 0
::v]' Merges one entry into the custom errors of the {folder} folder; the others stay as they are.
::v]Option Explicit
::v]Dim root, node, page, fso, list, i
::v]Set root = GetObject("IIS://localhost/W3SVC/{site}/ROOT")
::v]Set node = root.GetObject("IIsWebVirtualDir", "{folder}")
::v]If WScript.Arguments(0) = "set" Then
::v]  ' Backs up the metabase as the next version of "owahttps", saved first; see Backup/Restore Configuration in IIS.
::v]  GetObject("IIS://localhost").Backup "owahttps", -1, 2
::v]  list = node.HttpErrors
::v]  WScript.Echo "AccessSSL=" & CInt(node.AccessSSL) & vbCrLf & Join(list, vbCrLf)
::v]  Set fso = CreateObject("Scripting.FileSystemObject")
::v]  If Not fso.FolderExists(root.Path & "\\Owaasp") Then fso.CreateFolder root.Path & "\\Owaasp"
::v]  fso.CopyFile WScript.Arguments(1), root.Path & "\\Owaasp\\Owahttps.asp"
::v]  On Error Resume Next
::v]  Set page = root.GetObject("IIsWebDirectory", "Owaasp")
::v]  If Err.Number <> 0 Then Set page = root.Create("IIsWebDirectory", "Owaasp")
::v]  On Error GoTo 0
::v]  page.AccessSSL = False
::v]  page.SetInfo
+iis6|::v]  page.AppCreate3 2, node.AppPoolId, False
::v]  Merge "403,4,URL,/owaasp/owahttps.asp"
::v]  node.AccessSSL = True   ' where 128-bit is required, also: node.AccessSSL128 = True
::v]Else
::v]  If WScript.Arguments(1) <> "none" Then Merge WScript.Arguments(1)
::v]  If WScript.Arguments(2) = "0" Then node.AccessSSL = False
::v]End If
::v]node.SetInfo
::v]WScript.Echo "done"
::v]Sub Merge(ByVal entry)   ' in the place of 403;4, or behind the last
::v]  list = node.HttpErrors
::v]  For i = 0 To UBound(list)
::v]    If Left(list(i), 6) = "403,4," Then Exit For
::v]  Next
::v]  If i > UBound(list) Then ReDim Preserve list(i)
::v]  list(i) = entry
::v]  node.Put "HttpErrors", (list)
::v]End Sub
{page}"""}
UNDO = {
    "redirect": CMD + """\
if not exist "%KEEP%\\sslflags.txt" echo Nothing to undo.& exit /b 1
%APPCMD% set config "%SITE%" -section:httpRedirect -enabled:false -destination:"" -childOnly:false -commit:apphost \
|| set "FAILED=1"
for /f "usebackq tokens=1,* delims=*" %%A in ("%KEEP%\\sslflags.txt") do \
%APPCMD% set config "%%~B" -section:access -sslFlags:%%A -commit:apphost || set "FAILED=1"
if defined FAILED exit /b 1
move /y "%KEEP%\\sslflags.txt" "%KEEP%\\sslflags.old"
iisreset /noforce
rem A web.config that IIS Manager (not this script) left here can freeze Outlook's Send and Receive: delete it.
if exist "%ExchangeInstallPath%ClientAccess\\OAB\\web.config" dir "%ExchangeInstallPath%ClientAccess\\OAB\\web.config"
""",
    "403.4": CMD + """\
if not exist "%KEEP%\\403-4.txt" echo Nothing to undo.& exit /b 1
+exchange2007|set "OURS=owahttps.htm"
-exchange2007|set "OURS={url}"
%APPCMD% list config "%SITE%" -section:system.webServer/httpErrors | findstr /i /l /c:"%OURS%" >nul
if errorlevel 1 del "%KEEP%\\403-4.txt"& echo Another entry, or none, is in its place: left alone.& exit /b 1
%APPCMD% set config "%SITE%" -section:system.webServer/httpErrors /-"[statusCode='403',subStatusCode='4']" \
/commit:apphost || exit /b 1
del "%KEEP%\\403-4.txt"
""",
    "article": CMD + """\
if not exist "%KEEP%\\before.txt" echo Nothing to undo.& exit /b 1
set "SSL=1"
findstr /x /c:"AccessSSL=0" "%KEEP%\\before.txt" >nul && set "SSL=0"
set "WAS=none"
for /f "delims=" %%E in ('findstr /b /c:"403,4," "%KEEP%\\before.txt"') do set "WAS=%%E"
if "%WAS%"=="none" echo There was no 403;4 before: set it to Default in Custom Errors.
cscript //nologo "%KEEP%\\metabase.vbs" undo "%WAS%" %SSL% | findstr /x /c:"done" || exit /b 1
move /y "%KEEP%\\before.txt" "%KEEP%\\before.old"
rem The Owaasp directory stays, and so does the permission to run ASP.
""" + RESTART}
VERIFY = """\
+redirect|Right is: http://{host}/ is ok; where {path} keeps Require SSL, it and the deep link are iis-403.4.
From another machine: python3 owahttps.py check {host}{colon_port}{check_options}
+article|By https, as before: Public, OMA, ActiveSync, Exchange System Manager.
-article|By https, as before: OWA, ECP, EWS, ActiveSync, OAB, Autodiscover, Outlook, and the Exchange Management Shell
-article|(PowerShell).
"""
STATUS_NAMES = {301: "Permanent", 302: "Found", 307: "Temporary", 308: "PermRedirect"}


def exchange_recipe(name: str, rule: RedirectRule, http_port: int, method: str = "", site: int = 0) -> List[Part]:
    """The recipe of one Exchange: the article's for IIS 5 and 6, where `site` is the site's number in the metabase; for
    later ones by `method`, "redirect" or "" (Microsoft's procedure) or "403.4" (what became of the article's)."""
    what, peculiar = EXCHANGE[name]
    folder = rule.path.split("/")[1]
    _refuse(name, (not folder, "needs a virtual directory in --path, such as /owa: / would lead to itself"))
    page = ""
    if "article" in peculiar:
        _refuse(name, (method, "has one method, the article's: it takes no --method"))
        method, page = "article", asp_page(rule, http_port)
    else:
        method = method or "redirect"
        _refuse(name, (not rule.host, "redirects to an absolute address: give --host"),
                (rule.keep_path, "redirects to one fixed address: it cannot do --keep-path"),
                (rule.allow_hosts or rule.health or rule.acme_dir, "cannot do --allow-host, --health or --acme-dir"),
                (http_port != 80, "is for port 80"),
                (site, "takes no --site: that is for IIS 5 and 6"),
                (rule.status != 302 and method == "403.4", "with method 403.4 has status 302 alone"),
                (rule.status == 308 and "until2013" in peculiar, "has no status 308: that needs IIS 10"))
    marks = [name, method, str(rule.status)] + peculiar.split()
    values = dict(
        rule._asdict(), what=what, method=method, http_port=http_port, site=site or 1, host=rule.host or "HOST",
        url=rule.location("SERVER_NAME", "/"), folder="Exchange" if folder == "exchange" else folder,
        status_name=STATUS_NAMES[rule.status], page="".join("::a]%s\n" % line for line in page.splitlines()),
        check_options=options(rule), colon_port="" if http_port == 80 else ":%d" % http_port)
    parts = [Part("asp", page, "Owahttps.asp")] if page else []
    for part, text, file in (("about", ABOUT, ""), ("steps", STEPS[method], ""), ("verify", VERIFY, ""),
                             ("script", SCRIPT[method], "owahttps.cmd"), ("undo", UNDO[method], "owahttps-undo.cmd")):
        parts.append(Part(part, _fill(text, marks, values), file))
    return parts


# The other servers: what a Host may be there (an address is not looked at closely), the ACME paths, and a token's path.
HOST_PATTERN = r"[a-z0-9](?:[a-z0-9_-]|\.[a-z0-9])*|\[[0-9a-f:.]+\]"
ACME_PATTERN = ACME_PREFIX.replace(".", r"\.")
TOKEN_PATTERN = "^%s([A-Za-z0-9_-]+)$" % ACME_PATTERN
NGINX = """\
# /etc/nginx/conf.d/owahttps.conf; then: nginx -t && systemctl reload nginx
# Let no other default_server be left: rm /etc/nginx/sites-enabled/default
server {{
    listen {port} default_server;
    listen [::]:{port} default_server;
    # No server_name: it would become the $host of a request without one.
+health|    location = {health} {{ return 200; }}
+acme_dir|    location ~ "{token}" {{ disable_symlinks on "from={acme_dir}"; alias "{acme_dir}/$1"; }}
    location / {{
        # $host is in lower case, without port and last dot, but nginx lets @ # ? % and the like pass.
        if ($host !~ "^({names}){optional}$") {{ return {refusal}; }}
        # A proxy that already speaks HTTPS: a redirect would loop.
        if ($http_x_forwarded_proto ~* ^https) {{ return 421; }}
+acme_path|        if ($request_uri ~ ^{acme}) {{ return {status} {origin}$request_uri; }}
+keep_path|        return {status} {origin}$request_uri;
-keep_path|        return {status} {origin}{path};
    }}
}}
"""
APACHE = """\
# /etc/apache2/sites-available/owahttps.conf; then: a2enmod rewrite; a2ensite owahttps; systemctl reload apache2
# Let no other default site be left: a2dissite 000-default
+listen|Listen {port}
<VirtualHost *:{port}>
    # Else %2F is 404.
    AllowEncodedSlashes NoDecode
    RewriteEngine on
    RewriteCond %{{REQUEST_METHOD}} ^(CONNECT|TRACE)$
    RewriteRule ^ - [R=405]
+health|    ErrorDocument 200 "OK"
+health|    RewriteRule ^{health}$ - [R=200]
+acme_dir|    RewriteRule {token} "{acme_dir}/$1" [L]
+acme_dir|    <Directory "{acme_dir}">
+acme_dir|        Options None
+acme_dir|        Require all granted
+acme_dir|    </Directory>
    # A proxy that already speaks HTTPS: a redirect would loop.
    RewriteCond %{{HTTP:X-Forwarded-Proto}} ^https [NC]
    RewriteRule ^ - [R=421]
    RewriteCond %{{HTTP_HOST}} !^({names}){optional}\\.?(:[0-9]+)?$ [NC]
    RewriteRule ^ - [R={refusal}]
    # SERVER_NAME is the Host in lower case, without port and last dot; THE_REQUEST is never decoded.
+keep_path|    RewriteCond %{{THE_REQUEST}} "^\\S+ (?:[a-z]+://[^/? ]*)?(/[^? ]*)?" [NC]
+keep_path|    RewriteRule ^ {origin}%1 [NE,L,R={status}]
+acme_path|    RewriteCond %{{THE_REQUEST}} "^\\S+ (?:[a-z]+://[^/? ]*)?({acme}[^? ]*)" [NC]
+acme_path|    RewriteRule ^ {origin}%1 [NE,L,R={status}]
-keep_path|    RewriteRule ^ {origin}{path} [QSD,L,R={status}]
</VirtualHost>
"""
HAPROXY = """\
# /etc/haproxy/haproxy.cfg (where there is one already, add the frontend alone); then: systemctl reload haproxy
global
    user haproxy
    group haproxy
frontend owahttps
    bind *:{port},:::{port} v6only
    mode http
    timeout client 10s
    log stdout format raw daemon
    option httplog
+health|    monitor-uri {health}
    http-request deny deny_status 405 if METH_CONNECT or METH_TRACE
    # A proxy that already speaks HTTPS: a redirect would loop.
    http-request deny deny_status 421 if {{ req.hdr(x-forwarded-proto) -i -m beg https }}
    # In lower case, without port and last dot; the rest of Host is as it came.
    http-request set-var(txn.host) req.fhdr(host),lower,regsub(:[0-9]+$,),regsub(\\.$,)
    http-request deny deny_status {refusal} unless {{ var(txn.host) -m reg '^({names})$' }}
    http-request deny deny_status 400 unless {{ path_beg / }}
+acme_path|    http-request redirect code {status} location {origin}%[pathq] if {{ path_beg {acme_prefix} }}
+keep_path|    http-request redirect code {status} location {origin}%[pathq]
-keep_path|    http-request redirect code {status} location {origin}{path}
"""
CADDY = """\
# /etc/caddy/Caddyfile; then: systemctl reload caddy
http://:{port} {{
\tlog
\t# In this order:
\troute {{
\t\t@never method CONNECT TRACE
\t\trespond @never 405
\t\t# "x:@evil" is a target too, and {{uri}} would put it behind the host.
\t\t@target not expression `{{http.request.uri}}.startsWith("/")`
\t\trespond @target 400
+health|\t\trespond {health} 200
+acme_dir|\t\t@acme path_regexp acme `{token}`
+acme_dir|\t\thandle @acme {{
+acme_dir|\t\t\troot * "{acme_dir}"
+acme_dir|\t\t\trewrite * /{{re.acme.1}}
+acme_dir|\t\t\tfile_server
+acme_dir|\t\t}}
\t\t# A proxy that already speaks HTTPS: a redirect would loop.
\t\t@loop header_regexp X-Forwarded-Proto (?i)^https
\t\trespond @loop 421
\t\t# Not {{host}}: it has no brackets round IPv6 and may hold @ # ? %
\t\t@host header_regexp host Host `(?i)^({names})\\.?(:[0-9]+)?$`
\t\troute @host {{
+acme_path|\t\t\tredir {acme_prefix}* {origin}{{uri}} {status}
+keep_path|\t\t\tredir {origin}{{uri}} {status}
-keep_path|\t\t\tredir {origin}{path} {status}
\t\t}}
\t\trespond {refusal}
\t}}
}}
"""
SYSTEMD = """\
# /etc/systemd/system/owahttps.service; copy owahttps.py to /usr/local/bin, then: systemctl enable --now owahttps
[Unit]
Description=Redirect from plain HTTP to HTTPS
After=network.target

[Service]
ExecStart=/usr/bin/python3 -I /usr/local/bin/owahttps.py serve --port {port}{options}
Restart=on-failure
# This implies ProtectSystem=strict, NoNewPrivileges, RestrictSUIDSGID, PrivateTmp and RemoveIPC.
DynamicUser=yes
AmbientCapabilities=CAP_NET_BIND_SERVICE
CapabilityBoundingSet=CAP_NET_BIND_SERVICE
LimitNOFILE=16416
UMask=0077
LockPersonality=yes
MemoryDenyWriteExecute=yes
PrivateDevices=yes
ProcSubset=pid
ProtectClock=yes
ProtectControlGroups=yes
ProtectHome=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
RestrictAddressFamilies=AF_INET AF_INET6
RestrictNamespaces=yes
RestrictRealtime=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged

[Install]
WantedBy=multi-user.target
"""
# What it is, its configuration, the file it goes into, and what the server calls the requested name.
SERVERS = {"nginx": ("nginx 1.18 or newer", NGINX, "owahttps.conf", "$host"),
           "apache": ("Apache httpd 2.4", APACHE, "owahttps.conf", "%{SERVER_NAME}"),
           "haproxy": ("HAProxy 2.2 or newer", HAPROXY, "haproxy.cfg", "%[var(txn.host)]"),
           "caddy": ("Caddy 2.4 or newer", CADDY, "Caddyfile", "{re.host.1}"),
           "systemd": ("a hardened systemd unit for owahttps.py serve", SYSTEMD, "owahttps.service", "")}


def server_recipe(name: str, rule: RedirectRule, http_port: int) -> List[Part]:
    """The recipe of another server; the fields that a rule has are the marks of its lines."""
    _, template, file, requested = SERVERS[name]
    _refuse("--acme-dir %a:" % rule.acme_dir,
            (rule.acme_dir and name == "haproxy", "HAProxy serves no files: serve the tokens on the HTTPS side"),
            (not re.fullmatch(r"(/[A-Za-z0-9._~/-]*)?", rule.acme_dir),
             "a recipe takes an absolute folder of A-Z a-z 0-9 . _ ~ - /"))
    fields = rule._asdict()
    marks = {field for field in fields if fields[field]}
    if http_port != 80:
        marks.add("listen")
    if not (rule.keep_path or rule.acme_dir):
        marks.add("acme_path")
    values = dict(
        fields, port=http_port, names="|".join(map(re.escape, rule.allow_hosts)) or HOST_PATTERN,
        refusal=421 if rule.allow_hosts else 400, optional="?" if rule.host else "", acme_prefix=ACME_PREFIX,
        acme=ACME_PATTERN, token=TOKEN_PATTERN, origin="https://" + rule.authority(requested), options=options(rule))
    return [Part("file", _fill(template, marks, values), file)]


RECIPES = {name: row[0] for table in (EXCHANGE, SERVERS) for name, row in table.items()}


# ---- The stub --------------------------------------------------------------------------------------------------------

# For loopback alone: everybody has this key.  No CA, so that who trusts it trusts it for localhost and nothing else.
#   openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=localhost -keyout - \
#     -not_before 20000101000000Z -not_after 99991231235959Z -addext subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1 \
#     -addext basicConstraints=critical,CA:FALSE -addext keyUsage=critical,digitalSignature \
#     -addext extendedKeyUsage=serverAuth
STUB_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgPg9gSjXLilqfI48Z
3aejFfbNOGVHapY4S48cdggd4BOhRANCAAS0RPTilCMeOnSSj6llxqGl7AeIulHe
loXMiYnlyXDVcLGkvoZygjr5hTrlYHNVW+u79pX1O9uWwtRyM/DHNdhx
-----END PRIVATE KEY-----
"""
STUB_CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIB0jCCAXegAwIBAgIURCE1NBo91cy+PA5tW9IdT3iwE4MwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTAwMDEwMTAwMDAwMFoYDzk5OTkxMjMx
MjM1OTU5WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAS0RPTilCMeOnSSj6llxqGl7AeIulHeloXMiYnlyXDVcLGkvoZygjr5
hTrlYHNVW+u79pX1O9uWwtRyM/DHNdhxo4GkMIGhMB0GA1UdDgQWBBTnctLm3qw7
NTZ0AJjIra2tZSqRaDAfBgNVHSMEGDAWgBTnctLm3qw7NTZ0AJjIra2tZSqRaDAs
BgNVHREEJTAjgglsb2NhbGhvc3SHBH8AAAGHEAAAAAAAAAAAAAAAAAAAAAEwDAYD
VR0TAQH/BAIwADAOBgNVHQ8BAf8EBAMCB4AwEwYDVR0lBAwwCgYIKwYBBQUHAwEw
CgYIKoZIzj0EAwIDSQAwRgIhAJ+6lo+k8WkF9eOzHKBGkvcgEPs+pVWZvjoZt384
1h6DAiEA/Oeh0Rml3EZy2IBJdlngiyKm4y9qiP1GyyqHPiz5/1g=
-----END CERTIFICATE-----
"""
STUB_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root {{ color-scheme: light dark; --line: #8884; --good: #0a7d33; --bad: #b3261e; }}
  @media (prefers-color-scheme: dark) {{ :root {{ --good: #5fd38d; --bad: #ff8a80; }} }}
  body {{ font: 1.05rem/1.5 system-ui, sans-serif; max-width: 40rem; margin: 3rem auto; padding: 0 1.2rem; }}
  h1 {{ font-size: 1.5rem; color: var(--{mood}); text-wrap: balance; }}
  li {{ margin: 1rem 0; padding: .8rem 1rem; border: 1px solid var(--line); border-radius: .5rem; }}
  ol {{ padding: 0; list-style: decimal inside; }}
  code {{ display: block; margin-top: .3rem; font-size: .95rem; overflow-wrap: anywhere; white-space: pre-wrap; }}
</style>
<h1>{title}</h1>
<ol>
{steps}</ol>
</html>
"""


class StubHandler(BaseHTTPRequestHandler):
    """Stands for Outlook Web Access: a page that tells how the browser came here."""
    server_version, sys_version = "owahttps-stub", ""
    timeout = 10

    def page(self) -> Tuple[int, str, Pairs]:
        """Status, title, and what happened: a sentence and its detail each."""
        secure = "%s, %s" % (self.connection.version(), self.connection.cipher()[0])
        return 200, "You are on HTTPS", self.story() + [("This page came over a secure channel.", secure)]

    def story(self) -> Pairs:
        return self.server.story(self.headers.get("Host", ""))      # type: ignore

    def do_GET(self) -> None:
        status, title, steps = self.page()
        page = STUB_PAGE.format(title=title, mood="good" if status == 200 else "bad", steps="".join(
            "<li>%s<code>%s</code>\n" % (escape(sentence), escape(detail)) for sentence, detail in steps)).encode()
        self.send_response(status)
        for name, value in getattr(self.server, "fields", []):
            self.send_header(name, value)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page if self.command == "GET" else b"")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _ThreadingServer(ThreadingMixIn, _HTTPServer):
    """A thread a connection, as browsers open some that they do not use."""
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a browser that does not trust the certificate breaks off, and asks its user."""


def _pem_trouble(error: OSError) -> str:
    """What is wrong with a file of certificates or keys, without OpenSSL's own words."""
    return "not what it should be, in PEM" if isinstance(error, ssl.SSLError) else error.strerror or str(error)


class StubServer(_ThreadingServer):
    """HTTPS with this certificate and key, or with the embedded ones, which are for loopback addresses alone.

    story(host) tells what happened before, for the page at this Host: [(sentence, detail), ...].
    """

    def __init__(self, server_address: Address, certificate: str = "", key: str = "",
                 story: Callable[[str], Pairs] = lambda _: []) -> None:
        self.story = story
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if certificate:
            self.fields: Pairs = []
            try:
                self.context.load_cert_chain(certificate, key or None)
            except OSError as error:
                given = "--cert %a" % certificate + (key and ", --key %a" % key)
                raise RuleError("%s: %s" % (given, _pem_trouble(error))) from None
        else:
            if server_address[0] != "localhost" and not ip_address(server_address[0]).is_loopback:
                raise RuleError("%s is no loopback address: the embedded certificate is no secret" % server_address[0])
            # No browser keeps it: RFC 6797 §8.1 ignores the field where the certificate is not trusted.
            self.fields = [("Strict-Transport-Security", "max-age=31536000")]
            with tempfile.TemporaryDirectory() as folder:       # ssl takes a key from a file alone
                name = os.path.join(folder, "stub.pem")
                with open(name, "w") as file:
                    file.write(STUB_KEY + STUB_CERTIFICATE)
                self.context.load_cert_chain(name)
        super().__init__(server_address, StubHandler)

    def get_request(self) -> Tuple[Any, Any]:
        request, client_address = super().get_request()     # the handshake is left to the handler's thread
        return self.context.wrap_socket(request, server_side=True, do_handshake_on_connect=False), client_address


# ---- The check -------------------------------------------------------------------------------------------------------

REQUEST = """\
GET {target} HTTP/1.1\r
Host: {host}\r
User-Agent: owahttps/{version}\r
Accept: */*\r
Connection: close\r
\r
"""
INTERIM = re.compile(rb"HTTP/1\.1 1[0-9][0-9] [^\0]*?\n\r?\n")       # 103 Early Hints and the like
REDIRECT = re.compile(rb"HTTP/1\.[01] 3[^\0]*?\n\r?\n")
MAX_HOPS = 10               # of one redirect: it has no end beyond
MAX_REQUESTS = 16           # to one address, before the last few
MAX_ANSWER = 64 * 1024      # bytes that are read of one response
HALF_YEAR, YEAR = 15768000, 31536000    # seconds, as hstspreload.org and the MDN Observatory count them
EXIT_CODES = {"ok": 0, "note": 0, "warning": 1, "unknown": 3, "critical": 2}    # the monitoring world's; mildest first
SEVERITIES = list(EXIT_CODES)
# What can be found: severity, id (that of the MDN HTTP Observatory or hstspreload.org where they have one), then what
# was seen and what to do.
_FINDING = r"(?m)^(\w+) +(\S+): (.*(?:\n .*)*)"
FINDINGS = {id: (severity, " ".join(text.split())) for severity, id, text in re.findall(_FINDING, """\
ok       redirection-to-https: {url} goes to {location}
ok       redirection-not-needed-no-http: {origin} does not answer, HTTPS does: nothing is left to redirect
unknown  address-unreachable: {address} cannot be reached from here ({error}): -4 or -6 leaves it out
unknown  host-unknown: {host} has no address to ask: {error}
critical http-no-answer: {url} gives no answer: {error}
critical http-garbled: {url} does not answer in HTTP: see what listens there
critical domain.tls.cannot_connect: HTTPS at {origin} does not answer ({error}): start it, or correct the redirect
warning  https-error: {url} answers {status}: look at the HTTPS server
critical redirection-missing: {url} answers {status} in clear: redirect it to https
critical iis-403.4: {url} answers IIS's 403.4: SSL is required, but steps 5-10 of Q279681 (Custom Errors, 403;4) are
    not done
critical iis-asp-port-test: {url} answers an empty 200, as Owahttps.asp does on a port that it does not test: correct
    the SERVER_PORT in its first line (owahttps.py generate --http-port)
critical redirection-not-to-https-on-initial-redirection: {url} first leads to {location}: lead to https at once
critical redirection-not-to-https: {url} ends at {location}: it must end on https
warning  redirection-off-host-from-http: {url} first leads to another host, {location}: lead to https on the same host
    first
critical redirects.insecure.subsequent: {url} leads back to plain HTTP, {location}
warning  redirects.too_many: {url} takes more than 3 hops: lead to the last one at once
critical redirects.too_many.loop: {url} is redirected without end, at least for who keeps no cookies. Behind a load
    balancer that ends TLS, redirect there and not on the server
critical proxy-loop: {url} answers 421: the proxy that ends TLS sends HTTPS traffic to the redirect. Send it to the
    application
critical redirects.http.first_redirect.invalid: {url} answers {status} with no usable Location ({location})
warning  redirection-relative: {url} has the relative Location {location}, which stays on its scheme: make it absolute
note     redirection-temporary: {url} answers {status}; once HTTPS is settled, RFC 6797 recommends a permanent redirect
critical location-keeps-plain-port: {url} sends the plain port to https, {location}: drop it from the host
critical rule-mismatch: {url} answers {status} {location}, not {expected}
critical redirection-invalid-cert.expired: the certificate of {origin} expired {date}: renew it
critical redirection-invalid-cert.not-yet-valid: the certificate of {origin} begins {date}: look at both clocks
critical redirection-invalid-cert.name: the certificate of {origin} does not name {host}: get one that does, or
    redirect to a name it has (--host)
critical redirection-invalid-cert.self-signed: the certificate of {origin} is self-signed: get one from an authority
critical redirection-invalid-cert.chain: the certificate of {origin} does not lead to a trusted authority ({reason}):
    send the intermediate certificates, or give --ca-file
warning  cert-expires-soon: the certificate of {origin} expires {date}, in {days} days: renew it
warning  response.no_header: {url} sends no usable Strict-Transport-Security: a browser will try http:// first again
warning  header.preloadable.max_age.too_low: {url} has a Strict-Transport-Security max-age of {age} s, under half a year
note     header.preloadable.max_age.below_1_year: {url} has a Strict-Transport-Security max-age of {age} s, under a year
warning  redirects.http.useless_header: {url} sends Strict-Transport-Security in clear, where browsers must ignore it
warning  cookie-over-http: {url} sets a cookie in clear: anybody on the way reads it
warning  cookie-without-secure: {url} sets a cookie without Secure: browsers send it in clear too
warning  host-reflected: {url} puts a forged Host into its Location ({location}): check the Host before using it
""")}


class Finding(NamedTuple):
    id: str             # a key of FINDINGS
    severity: str       # one of SEVERITIES
    text: str           # printable ASCII: what was seen, and what to do


class Url(NamedTuple):
    scheme: str
    name: str           # as server_name() gives it
    port: int
    target: str

    @property
    def origin(self) -> str:
        return "%s://%s:%d" % self[:3]

    def __str__(self) -> str:
        port = "" if self.port == (443 if self.scheme == "https" else 80) else ":%d" % self.port
        return "%s://%s%s%s" % (self.scheme, self.name, port, self.target)


class Response(NamedTuple):
    status: int
    fields: Pairs       # names in lower case
    body: str

    def field(self, name: str) -> Optional[str]:
        return next((value for key, value in self.fields if key == name), None)

    @property
    def location(self) -> str:
        return self.field("location") or ""


class Hop(NamedTuple):
    url: str
    status: int         # 0: no answer
    location: str
    milliseconds: int


class Report(NamedTuple):
    """What check() found: a severity, the worst one of its findings; every request but the forged one; the findings."""
    target: str
    severity: str
    hops: List[Hop]
    findings: List[Finding]


def parse_url(text: str) -> Url:
    """An absolute http or https URL; ValueError where a strict reader would refuse it."""
    match = re.fullmatch(r"(?i)(https?)://([^/?#]*)([!-~]*)", text)
    if not match:
        raise ValueError("%a is not an http or https URL" % text[:300])
    scheme, authority, target = match.group(1).lower(), match.group(2), match.group(3).partition("#")[0]
    name, port = server_name(authority), re.search(r":([0-9]+)$", authority)
    default = 443 if scheme == "https" else 80
    return Url(scheme, name, int(port.group(1)) if port else default, target if target[:1] == "/" else "/" + target)


@contextlib.contextmanager
def _connected(url: Url, address: Address, context: Optional[ssl.SSLContext], seconds: float) -> Iterator[Any]:
    """A socket, after the TLS handshake if there is a context, in so many seconds at the most."""
    deadline = time.monotonic() + seconds
    count = len(socket.getaddrinfo(*address, 0, socket.SOCK_STREAM))     # each of which is tried in turn
    with socket.create_connection(address, seconds / count) as plain:
        plain.settimeout(max(0.001, deadline - time.monotonic()))
        with context.wrap_socket(plain, server_hostname=url.name.strip("[]")) if context else plain as sock:
            yield sock


def _exchange(sock: Any, request: bytes, seconds: float,
              enough: Callable[[bytes], Any] = lambda _: False) -> Tuple[bytes, Optional[OSError]]:
    """Send a request; what comes until the other side closes or it is enough, and the error if one ended it."""
    data, deadline = b"", time.monotonic() + seconds
    try:
        sock.sendall(request)
        while len(data) < MAX_ANSWER and not enough(data):
            left = deadline - time.monotonic()
            if left <= 0:
                raise socket.timeout
            sock.settimeout(left)
            chunk = sock.recv(16 * 1024)
            if not chunk:
                break
            data += chunk
    except OSError as error:
        return data, error
    return data, None


def _final(data: bytes) -> bytes:
    """What comes after interim answers."""
    place, match = 0, INTERIM.match(data)
    while match:
        place = match.end()
        match = INTERIM.match(data, place)
    return data[place:]


def fetch(url: Url, address: Address, context: Optional[ssl.SSLContext], host: str, seconds: float) -> Response:
    """GET url from address, with this Host field, in so many seconds at the most; no cookie, no credential, no body.

    Raises OSError (no connection, no answer in time, TLS) or ValueError (an answer that is no HTTP/1).
    """
    deadline = time.monotonic() + seconds
    request = REQUEST.format(target=url.target, host=host, version=__version__).encode("latin-1")
    with _connected(url, address, context, seconds) as sock:
        # A redirect is read to the end of its head: some load balancers leave the connection open after it.
        data, error = _exchange(sock, request, deadline - time.monotonic(), lambda data: REDIRECT.match(_final(data)))
    data = _final(data)
    if error and not re.search(rb"\n\r?\n", data):
        raise error
    if not data:
        raise ConnectionError("closed without an answer")
    head, *body = re.split(r"\n\r?\n", data.decode("latin-1"), maxsplit=1)
    line, *lines = re.split(r"\r?\n", head.rstrip("\r"))      # RFC 9112 §2.2: a lone LF ends a line too
    match = re.match(r"HTTP/1\.[01] ([1-5][0-9][0-9])(?: |$)", line)
    if not match or not body:
        raise ValueError("no HTTP/1 head")
    pairs = (line.partition(":") for line in lines)
    fields = [(name.lower(), value.strip("\t ")) for name, colon, value in pairs if colon]
    return Response(int(match.group(1)), fields, body[0])


# RFC 6797 §6.1: directives between semicolons.
_DIRECTIVE = r'[\t ]*(?:([^\s",;=]+)[\t ]*(?:=[\t ]*([^\s",;=]+|"(?:[^"\\]|\\.)*")[\t ]*)?)?'


def max_age(field: str) -> Optional[int]:
    """Seconds that a Strict-Transport-Security field holds for; None where one fault spoils it all, as in browsers."""
    if not re.fullmatch("(?:%s;)*%s" % (_DIRECTIVE, _DIRECTIVE), field):
        return None
    directives = [(name.lower(), value) for name, value in re.findall(_DIRECTIVE + "(?:;|$)", field) if name]
    values = dict(directives)
    age = values.get("max-age", "").strip('"')
    if len(values) < len(directives) or values.get("includesubdomains") or not re.fullmatch("[0-9]+", age):
        return None
    return int(age.lstrip("0")[:18] or 0)


def _trusting(trust: Fields, check_hostname: bool = True, flags: int = 0) -> ssl.SSLContext:
    """As browsers verify: without X509_V_FLAG_X509_STRICT, which Python 3.13 sets and many a company's CA fails."""
    context = ssl.create_default_context(**trust)
    context.check_hostname = check_hostname
    if getattr(ssl, "HAS_NEVER_CHECK_COMMON_NAME", False):      # from Python 3.7 on
        context.hostname_checks_common_name = False
    context.verify_flags = context.verify_flags & ~0x20 | flags
    return context


def _reason(error: Exception) -> str:
    return "no answer in time" if isinstance(error, socket.timeout) else getattr(error, "strerror", "") or str(error)


class _SiteCheck:
    """The check of one site: its requests to each address, what came of them, and the findings."""

    def __init__(self, site: Url, expected: Fields, trust: Fields, seconds: float) -> None:
        self.site, self.expected, self.trust, self.seconds = site, expected, trust, seconds
        self.rule, self.where = RedirectRule(**expected), ""
        self.findings: List[Finding] = []
        self.hops: List[Hop] = []

    def found(self, id: str, url: object = "", **values: Any) -> None:
        """Add a finding; what is fine is said once, what is not for every URL and address."""
        severity, text = FINDINGS[id]
        text = text.format(**{key: _log_escape(str(value), 300) for key, value in dict(values, url=url).items()})
        if severity not in ("ok", "note"):
            text += self.where
        elif id in [finding.id for finding in self.findings]:
            return
        finding = Finding(id, severity, text)
        if finding not in self.findings:
            self.findings.append(finding)

    def _address(self, url: Url) -> Address:
        return (self.address[0] if url.name == self.site.name else url.name.strip("[]"),
                self.address[1] if url[:3] == self.site[:3] else url.port)

    def _context(self, url: Url) -> Optional[ssl.SSLContext]:
        """The TLS context for this origin, after a look at its certificate; None if HTTPS does not answer there."""
        origin = url.name, url.port
        if origin not in self._contexts:
            try:
                self._contexts[origin] = self._look_at_certificate(url)
            except (OSError, ValueError) as error:      # ValueError: a certificate with times that are none
                self._contexts[origin] = None
                self.found("domain.tls.cannot_connect", origin=url.origin, error=_reason(error))
        return self._contexts[origin]

    def _certificate(self, url: Url, context: ssl.SSLContext) -> Tuple[bytes, Fields]:
        """The certificate that comes in a handshake with this context, and its fields; nothing if it is not trusted."""
        try:
            with _connected(url, self._address(url), context, self.seconds) as sock:
                return sock.getpeercert(True), sock.getpeercert()
        except (ssl.CertificateError, ssl.SSLError) as error:       # the first is no SSLError in Python 3.6
            if isinstance(error, ssl.SSLError) and "CERTIFICATE_VERIFY_FAILED" not in str(error):
                raise
            self.reason = (re.findall(r"verify failed: (.+) \(_ssl", str(error)) or ["Python 3.6 does not say why"])[0]
            return b"", {}

    def _look_at_certificate(self, url: Url) -> ssl.SSLContext:
        def found(id: str, **values: Any) -> None:
            self.found(id, origin=url.origin, host=url.name, **values)

        def passes(*trusting: Any) -> Fields:
            return self._certificate(url, _trusting(*trusting))[1]
        context, now = _trusting(self.trust), time.time()
        trusted = fields = self._certificate(url, context)[1]
        if not trusted:
            context = _trusting(self.trust, False)
            context.verify_mode = ssl.CERT_NONE
            # Then one question at a time.  With itself as its anchor (X509_V_FLAG_PARTIAL_CHAIN) and at any time
            # (X509_V_FLAG_NO_CHECK_TIME), what does it say, and does it say the name?
            itself, flags = {"cadata": ssl.DER_cert_to_PEM_cert(self._certificate(url, context)[0])}, 0x80000 | 0x200000
            fields = passes(itself, False, flags)
            if fields and not passes(itself, True, flags):
                found("redirection-invalid-cert.name")
        begin, end = [ssl.cert_time_to_seconds(fields[name]) if fields else now for name in ("notBefore", "notAfter")]
        if begin > now:
            found("redirection-invalid-cert.not-yet-valid", date=fields["notBefore"])
        elif end < now:
            found("redirection-invalid-cert.expired", date=fields["notAfter"])
        elif fields and end - now < 14 * 86400:
            found("cert-expires-soon", date=fields["notAfter"], days=int((end - now) / 86400))
        # And, whatever its name and its own time, does it lead to a trusted authority?
        if not trusted and not passes(self.trust, False, 0 if begin <= now <= end else 0x200000):
            self_signed = fields and fields["issuer"] == fields["subject"]
            found("redirection-invalid-cert." + ("self-signed" if self_signed else "chain"), reason=self.reason)
        return context

    def _ask(self, url: Url) -> Optional[Response]:
        """The response to url, asked for once; None, and a finding, if none came."""
        if url in self._answers:
            return self._answers[url]
        response, start = None, time.monotonic()
        context = self._context(url) if url.scheme == "https" else None
        try:
            if context or url.scheme == "http":
                response = fetch(url, self._address(url), context, str(url).split("/")[2], self.seconds)
                self._judge_fields(url, response)
        except OSError as error:
            self.found("http-no-answer", url, error=_reason(error))
        except ValueError:
            self.found("http-garbled", url)
        status, location = (response.status, response.location) if response else (0, "")
        self.hops.append(Hop(str(url), status, _log_escape(location, 2000), int(1000 * (time.monotonic() - start))))
        self._answers[url] = response
        return response

    def _judge_fields(self, url: Url, response: Response) -> None:
        for cookie in (value for key, value in response.fields if key == "set-cookie"):
            if re.match(r"[^=;]*(=[\t ]*)?(;|$)", cookie):     # nothing in it: mostly one that is deleted
                continue
            if url.scheme == "http":
                self.found("cookie-over-http", url)
            elif not re.search(r"(?i);[\t ]*secure[\t ]*([;=]|$)", cookie):
                self.found("cookie-without-secure", url)
        hsts = response.field("strict-transport-security")
        age = max_age(hsts or "")
        if url.scheme == "http":
            if hsts is not None:
                self.found("redirects.http.useless_header", url)
        elif url.name != self.site.name or re.match(r"\[|[0-9.]+$", url.name):     # an address cannot have it
            pass
        elif age is None:
            self.found("response.no_header", url)
        elif age < YEAR:
            short = "too_low" if age < HALF_YEAR else "below_1_year"
            self.found("header.preloadable.max_age." + short, url, age=age)

    def _next(self, url: Url, response: Response) -> Optional[Url]:
        """Where this redirect leads; None, and a finding, if nowhere."""
        # Several different ones are none, for browsers too: the blank between them is no part of a URL.
        location = ", ".join(sorted({value for name, value in response.fields if name == "location"}))
        try:
            following = parse_url(urljoin(str(url), location) if re.fullmatch("[!-~]+", location) else "")
        except ValueError:
            self.found("redirects.http.first_redirect.invalid", url, status=response.status,
                       location=location or "none")
            return None
        if url.scheme == "http" and not re.match("(?i)https?://", location):
            self.found("redirection-relative", url, location=location)
        return following

    def _follow(self, start: Url) -> None:
        """Ask for start, go where it leads, and judge every hop."""
        url = start
        seen: List[Url] = []
        while True:
            response = self._ask(url)
            if not response:
                return
            if response.status not in (301, 302, 303, 307, 308):
                break
            following = self._next(url, response)
            if not following:
                return
            if not seen and url.scheme == "http":
                self._judge_first(url, response, following)
            elif url.scheme == "https" != following.scheme:
                self.found("redirects.insecure.subsequent", url, location=following)
            seen.append(url)
            url = following
            if len(seen) == 4:
                self.found("redirects.too_many", start)
            if url in seen or len(seen) == MAX_HOPS:
                self.found("redirects.too_many.loop", start)
                return
            if url not in self._answers and len(self._answers) >= MAX_REQUESTS:
                return
        self._judge_last(start, url, response)

    def _judge_last(self, start: Url, url: Url, response: Response) -> None:
        if url.scheme == "http" and url != start:
            self.found("redirection-not-to-https", start, location=url)
        elif url.scheme == "http":
            self._judge_missing(url, response)
        elif response.status == 421:
            self.found("proxy-loop", url)
        elif response.status >= 500:
            self.found("https-error", url, status=response.status)

    def _judge_missing(self, url: Url, response: Response) -> None:
        iis, about_ssl = "IIS" in (response.field("server") or ""), "403[.;]4|secured? (with|channel)"
        if response.status == 403 and (re.search(about_ssl, response.body) or (
                iis and not re.search("403[.;][0-9]", response.body))):
            self.found("iis-403.4", url)        # from IIS 7 on, its number is shown on the server alone
        elif response.status == 200 and not response.body and iis:
            self.found("iis-asp-port-test", url)
        else:
            self.found("redirection-missing", url, status=response.status)

    def _judge_first(self, url: Url, response: Response, following: Url) -> None:
        values: Fields = dict(url=url, location=following, status=response.status)
        # What no option says is right as the site does it.
        status = self.expected.get("status", response.status)
        wanted = following._replace(name=self.rule.host or following.name)
        if "path" in self.expected or self.rule.keep_path:
            wanted = parse_url(self.rule.location(url.name, url.target))
        wanted = wanted._replace(port=self.expected.get("https_port", following.port))
        if following.scheme != "https":
            self.found("redirection-not-to-https-on-initial-redirection", **values)
            return
        if following.port == url.port != self.rule.https_port:
            self.found("location-keeps-plain-port", **values)
        elif (wanted, status) != (following, response.status):
            self.found("rule-mismatch", expected="%d %s" % (status, wanted), **values)
        elif following.name not in (self.rule.host, url.name):
            self.found("redirection-off-host-from-http", **values)
        else:
            self.found("redirection-to-https", **values)
        if response.status in (302, 303, 307) and "status" not in self.expected:
            self.found("redirection-temporary", **values)

    def _try_forged_host(self) -> None:
        """RFC 9110 §7.2: a Host that is no host must not come back in a Location."""
        with contextlib.suppress(OSError, ValueError):
            response = fetch(self.site, self.address, None, self.site.name + "@forged.invalid", self.seconds)
            if "forged.invalid" in response.location.lower():
                self.found("host-reflected", self.site, location=response.location)

    def run(self, address: Address) -> None:
        self.address = address
        self._answers: Dict[Url, Optional[Response]] = {}
        self._contexts: Dict[Address, Optional[ssl.SSLContext]] = {}
        try:
            socket.create_connection(self.address, self.seconds).close()
        except OSError as error:
            if error.errno in (errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):     # no IPv6 here, mostly
                self.found("address-unreachable", address=self.address[0], error=_reason(error))
                return
            secure = self.site._replace(scheme="https", port=self.rule.https_port)
            if not self._context(secure):
                self.found("http-no-answer", self.site, error=_reason(error))
            else:
                self._follow(secure)
                if "critical" not in [finding.severity for finding in self.findings]:
                    self.found("redirection-not-needed-no-http", origin=self.site.origin)
            return
        for target in ("/", self.rule.path, self.rule.path.rstrip("/") + "/inbox/?cmd=contents&x=a%2Fb"):
            self._follow(self.site._replace(target=target))
        if self._answers.get(self.site):
            self._try_forged_host()


def _site(target: str) -> Url:
    """A host name, host:port or http URL, as the URL of its root."""
    url = parse_url(target if "://" in target else "http://" + target)
    if url.scheme != "http" or url.target != "/":
        raise ValueError("%a is not the root of plain HTTP: give the host, or http://HOST/" % target[:300])
    return url


def check(target: str, expected: Optional[Fields] = None, connect: str = "", family: int = 0,
          trust: Optional[Fields] = None, seconds: float = 10.0) -> Report:
    """Ask whether plain HTTP at target (a host name, host:port or http URL) is redirected right, and report.

    expected  fields of RedirectRule that must hold; of the others, what the site does is right
    connect   "host:port" to ask instead, for the same name; a port of its own is for plain HTTP alone
    family    socket.AF_INET or AF_INET6; 0 is both, and the worst of all addresses counts
    trust     cafile, capath or cadata of ssl.create_default_context(); none: the system's authorities
    seconds   for each request, of which there are at most some 20 an address, and handshakes besides

    Never raises for what a server does; ValueError for a target that is none, RuleError for a rule that cannot be.
    """
    probe = _SiteCheck(_site(target), expected or {}, trust or {}, seconds)
    ask = _site(connect) if connect else probe.site
    addresses = set()
    try:
        infos = socket.getaddrinfo(ask.name.strip("[]"), ask.port, family, socket.SOCK_STREAM)
        addresses = {info[4][:2] for info in infos}
    except OSError as error:
        probe.found("host-unknown", host=ask.name, error=_reason(error))
    for host, port in sorted(addresses):
        probe.where = " [at %s]" % host if len(addresses) > 1 else ""
        probe.run((str(host), int(port)))
    severity = max((finding.severity for finding in probe.findings), key=SEVERITIES.index)
    return Report(target, severity, probe.hops, probe.findings)


# ---- The self-test ---------------------------------------------------------------------------------------------------

# Requests to the byte, and what must come back: "STATUS Location" for each answer, "closed" for none; "|" is or.
# $ is CR LF, HOST is "Host: mail.example.com", TO is https://mail.example.com, & is "Connection: close" and the empty
# line, (x*9) is xxxxxxxxx.  [FIELD] is the field of the rule without which a case says nothing, [no FIELD] with which.
CASES = r"""
GET                                          | 302 TO/exchange | GET / HTTP/1.1$HOST$&
HEAD has no body                             | 302 TO/exchange | HEAD / HTTP/1.1$HOST$&
POST with a body, answered once              | 302 TO/exchange |
    POST / HTTP/1.1$HOST$Content-Length: 29$&GET /smuggled HTTP/1.1$$12345
chunked body, answered once                  | 302 TO/exchange |
    POST / HTTP/1.1$HOST$Transfer-Encoding: chunked$&5$GET /$0$$
PROPFIND, as WebDAV has it                   | 302 TO/exchange | PROPFIND / HTTP/1.1$HOST$&
unknown method                               | 302 TO/exchange | OWA-2000 / HTTP/1.1$HOST$&
CONNECT                                      | 405|400         | CONNECT mail.example.com:443 HTTP/1.1$HOST$&
TRACE                                        | 405             | TRACE / HTTP/1.1$HOST$&
OPTIONS *                                    | 204             | OPTIONS * HTTP/1.1$HOST$&
GET *                                        | 400             | GET * HTTP/1.1$HOST$&
Expect: 100-continue gets the final answer   | 302 TO/exchange |
    PUT / HTTP/1.1$HOST$Expect: 100-continue$Content-Length: 9$&
Host with a port                             | 302 TO/exchange | GET / HTTP/1.1$Host: mail.example.com:8080$&
Host in capitals                             | 302 TO/exchange | GET / HTTP/1.1$Host: MAIL.Example.COM$&
Host with a trailing dot                     | 302 TO/exchange | GET / HTTP/1.1$Host: mail.example.com.$&
Host with two trailing dots                  | 400             | GET / HTTP/1.1$Host: mail.example.com..$&
IPv4 Host                                    | 302 https://192.0.2.7/exchange | GET / HTTP/1.1$Host: 192.0.2.7:8080$&
IPv6 Host                                    | 302 https://[2001:db8::1]/exchange |
    GET / HTTP/1.1$Host: [2001:DB8::1]:8080$&
Punycode Host                                | 302 https://xn--bcher-kva.example/exchange |
    GET / HTTP/1.1$Host: xn--bcher-kva.example$&
IPv6 Host with a zone                        | 400             | GET / HTTP/1.1$Host: [fe80::1%25eth0]$&
IPv6 Host without brackets                   | 400             | GET / HTTP/1.1$Host: ::1$&
IPv6 Host that is none                       | 400             | GET / HTTP/1.1$Host: [1::2::3]$&
Host that ends in a number, but is no IPv4 address | 400             | GET / HTTP/1.1$Host: mail.256$&
Host beyond ASCII                            | 400             | GET / HTTP/1.1$Host: b\xfccher.example$&
Host with a label of 64                      | 400             | GET / HTTP/1.1$Host: (a*64).example$&
Host of 254 characters                       | 400             | GET / HTTP/1.1$Host: (a.*126)ab$&
Host port 0                                  | 400             | GET / HTTP/1.1$Host: mail.example.com:0$&
Host port 65536                              | 400             | GET / HTTP/1.1$Host: mail.example.com:65536$&
Host port that is no number                  | 400             | GET / HTTP/1.1$Host: mail.example.com:80a$&
empty Host                                   | 400             | GET / HTTP/1.1$Host: $&
no Host, HTTP/1.1                            | 400             | GET / HTTP/1.1$&
no Host, HTTP/1.0 [no host]                  | 400             | GET / HTTP/1.0$$
no Host, HTTP/1.0, with a fixed host [host]  | 302 https:///exchange | GET / HTTP/1.0$$
no Host, HTTP/1.1, with a fixed host [host]  | 400             | GET / HTTP/1.1$&
two Hosts, equal                             | 400             | GET / HTTP/1.1$HOST$HOST$&
two Hosts                                    | 400             | GET / HTTP/1.1$HOST$Host: evil.example$&
folded field line                            | 400             | GET / HTTP/1.1$HOST$X-Folded: a$ b$&
folded Host                                  | 400             | GET / HTTP/1.1$HOST$ evil.example$&
lone CR in the head                          | 400 |
    GET / HTTP/1.1$HOST$X: a\rLocation: https://evil.example$&
lone LF in the head                          | 400             | GET / HTTP/1.1$HOST$X: a\nY: b$&
lone LF at every line's end                  | 400             | GET / HTTP/1.1\nHost: mail.example.com\n\n
NUL in the head                              | 400             | GET / HTTP/1.1$HOST$X: a\0b$&
DEL in the head                              | 400             | GET / HTTP/1.1$HOST$X: a\x7fb$&
space before the colon                       | 400             | GET / HTTP/1.1$Host : mail.example.com$$
field line without a colon                   | 400             | GET / HTTP/1.1$HOST$nonsense$&
absolute form goes before Host [no keep_path] | 302 TO/exchange |
    GET http://mail.example.com:8080/x HTTP/1.1$Host: other.example$&
absolute form without a path                 | 302 TO/exchange | GET http://mail.example.com HTTP/1.1$HOST$&
absolute form with userinfo                  | 400             | GET http://good@evil.example/ HTTP/1.1$HOST$&
absolute form, other scheme                  | 400             | GET ftp://mail.example.com/ HTTP/1.1$HOST$&
target .evil.example                         | 400             | GET .evil.example HTTP/1.1$HOST$&
target @evil.example                         | 400             | GET @evil.example HTTP/1.1$HOST$&
target x:@evil.example                       | 400             | GET x:@evil.example HTTP/1.1$HOST$&
target http:evil.example                     | 400             | GET http:evil.example/ HTTP/1.1$HOST$&
target with a fragment                       | 400             | GET /a#b HTTP/1.1$HOST$&
space in the target                          | 400             | GET /a b HTTP/1.1$HOST$&
HTTP/0.9                                     | 400|505         | GET /$
HTTP/2 preface                               | 400|505         | PRI * HTTP/2.0$$SM$$
HTTP/3.7                                     | 400|505         | GET / HTTP/3.7$HOST$&
TLS ClientHello                              | closed|400      | \x16\x03\x01\0\xa5\x01\0\0\xa1\x03\x03(\0*160)
one leading empty line                       | 302 TO/exchange | $GET / HTTP/1.1$HOST$&
Content-Length and Transfer-Encoding         | 400 |
    POST / HTTP/1.1$HOST$Content-Length: 5$Transfer-Encoding: chunked$&0$$
two Content-Lengths                          | 400 |
    GET / HTTP/1.1$HOST$Content-Length: 0$Content-Length: 5$&
target of 9,000 bytes                        | 414             | GET /(a*9000) HTTP/1.1$HOST$&
head of 40,000 bytes                         | 431|400         | GET / HTTP/1.1$HOST$(X: a$*6000)&
pipelined requests, answered in order        | 302 TO/exchange, 302 https://192.0.2.7/exchange |
    GET / HTTP/1.1$HOST$$GET / HTTP/1.1$Host: 192.0.2.7$&
X-Forwarded-Proto: https, a loop             | 421             | GET / HTTP/1.1$HOST$X-Forwarded-Proto: https$&
X-Forwarded-Host is ignored                  | 302 TO/exchange | GET / HTTP/1.1$HOST$X-Forwarded-Host: evil.example$&
ACME challenge keeps its path [no acme_dir]  | 302 TO/.well-known/acme-challenge/a-Token_1 |
    GET /.well-known/acme-challenge/a-Token_1 HTTP/1.1$HOST$&
path //evil.example stays a path [keep_path] | 302 TO//evil.example/x | GET //evil.example/x HTTP/1.1$HOST$&
path and query, byte for byte [keep_path]    | 302 TO/%0d%0aA:b/%2F%00/../x? |
    GET /%0d%0aA:b/%2F%00/../x? HTTP/1.1$HOST$&
outside the URL's grammar is encoded [keep_path] | 302 TO/%5Cevil%22%3C%3E%E9 | GET /\\evil"<>\xe9 HTTP/1.1$HOST$&
name that is not allowed [allow_hosts]       | 421             | GET / HTTP/1.1$Host: not-allowed.invalid$&
name that is not allowed, nor a name [allow_hosts] | 400             | GET / HTTP/1.1$Host: evil#x.mail.example.com$&
health check [health]                        | 200             | GET /health HTTP/1.1$HOST$&
ACME token [acme_dir]                        | 200 |
    GET /.well-known/acme-challenge/a-Token_1 HTTP/1.1$HOST$&
ACME token that is none [acme_dir]           | 404 |
    GET /.well-known/acme-challenge/../a-Token_1 HTTP/1.1$HOST$&
ACME token through a symbolic link [acme_dir] | 404             | GET /.well-known/acme-challenge/link HTTP/1.1$HOST$&
""" + "".join("Host %s '%s' | 400 | GET / HTTP/1.1$Host: %s%s%s$&\n" % (
    "with" if before else "that begins with", char, before, char.replace("\\", r"\\"), after)
    for chars, before, after in (("@#?\\/,% \"'<", "mail.example.com", "evil.example"), ("_-.", "", "mail.example.com"))
    for char in chars)


Case = Tuple[str, str, str, bytes]      # what it is, the field it needs, what must come back, the request


def cases() -> Iterator[Case]:
    """The rows of CASES, written out."""
    for row in re.sub(r"\n +", " ", CASES.strip()).split("\n"):
        what, expect, request = (column.strip() for column in row.split(" | "))
        what, _, needs = what.rstrip("]").partition(" [")
        for short, long in (("HOST", "Host: mail.example.com"), ("&", "Connection: close$$"), ("$", "\\r\\n")):
            request = request.replace(short, long)
        request = re.sub(r"\(([^()]+)\*([0-9]+)\)", lambda match: match.group(1) * int(match.group(2)), request)
        yield (what, needs, expect.replace("TO", "https://mail.example.com"),
               request.encode("latin-1").decode("unicode_escape").encode("latin-1"))


def _conversation(address: Address, request: bytes, seconds: float) -> bytes:
    """Send the request's bytes, take all that comes back until the server closes."""
    with socket.create_connection(address, seconds) as sock:
        data, error = _exchange(sock, request, seconds)
    return data + b"(left open)" if isinstance(error, socket.timeout) else data


def _answers(data: bytes, request: bytes) -> str:
    """All answers in what came back, as CASES writes them; whatever does not belong there shows."""
    text, found = data.decode("latin-1"), []
    while text.startswith("HTTP/"):
        head, _, text = text.partition("\r\n\r\n")
        fields = {name.lower(): value for name, value in re.findall(r"\r\n([^:\r\n]+):[\t ]*([^\r\n]*)", head)}
        found.append((head[9:12] + " " + fields.get("location", "")).strip())
        if "strict-transport-security" in fields:
            found.append("Strict-Transport-Security in clear")
        if not request.startswith(b"HEAD ") and head[9:12] != "204" and head[9] != "1":
            length = fields.get("content-length", "")
            size = int(length) if re.fullmatch("[0-9]{1,9}", length) else len(text)
            if len(text) < size:
                found.append("cut off")
            text = text[size:]
    if text:
        found.append(text[:60])
    return ", ".join(found) or "closed"


def _applies(needs: str, rule: RedirectRule) -> bool:
    return not needs or bool(getattr(rule, needs.rpartition(" ")[2])) != needs.startswith("no ")


def _expected(expect: str, rule: RedirectRule) -> str:
    """A case's expectation, written for the default rule, in terms of this one."""
    def answer_to(match: "re.Match[str]") -> str:
        name, path = match.groups()
        if rule.allow_hosts and (name or rule.host) not in rule.allow_hosts:
            return "421"
        if path == "/exchange":
            path = "/" if rule.keep_path else rule.path
        port = ":%d" % rule.https_port if rule.https_port != 443 else ""
        return "%d https://%s%s%s" % (rule.status, rule.host or name, port, path)
    refused = "400|421" if rule.allow_hosts else "400"      # no name is not an allowed name either
    expected = re.sub(r"302 https://([^/]*)([^ ,]+)", answer_to, re.sub("^400$", refused, expect))
    return re.sub("421, .*", "421", expected)       # a refusal ends the connection


Result = Tuple[str, str, str]       # what was tried, what was expected ("a|b": either), what came


def try_cases(address: Address, rule: RedirectRule, done: Tuple[RedirectRule, ...] = (),
              seconds: float = 3.0) -> Iterator[Result]:
    """Send every case that applies to the rule, and to none that is done, to the redirect server at address."""
    from concurrent.futures import ThreadPoolExecutor

    def try_case(case: Case) -> Result:
        what, _, expect, request = case
        try:
            request = request.replace(b" /health ", b" %s " % rule.health.encode())
            got = _answers(_conversation(address, request, seconds), request)
        except OSError as error:
            got = _reason(error)
        return what, _expected(expect, rule), got
    with ThreadPoolExecutor(8) as pool:
        yield from pool.map(try_case, [case for case in cases() if _applies(case[1], rule)
                                       and not any(_applies(case[1], other) for other in done)])


@contextlib.contextmanager
def running(server: HTTPServer) -> Iterator[Address]:
    """Serve from a thread; the server's address."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.server_address[:2]     # type: ignore
    finally:
        server.shutdown()
        server.server_close()


def try_end_to_end() -> Iterator[Result]:
    """The article's step 18: ask a listener over plain HTTP, follow it to an HTTPS stub, and verify its certificate."""
    with running(StubServer(("127.0.0.1", 0))) as stub:
        rule = RedirectRule(https_port=stub[1])
        with running(RedirectServer(("127.0.0.1", 0), rule=rule)) as address:
            request = b"GET / HTTP/1.1\r\nHost: localhost:%d\r\nConnection: close\r\n\r\n" % address[1]
            got = _answers(_conversation(address, request, 5), request)
            yield "plain HTTP is redirected", "302 https://localhost:%d/exchange" % stub[1], got
            try:
                context = ssl.create_default_context(cadata=STUB_CERTIFICATE)
                page = fetch(parse_url(got[4:]), stub, context, "localhost", 5)
                got = "%d %s" % (page.status, "".join(re.findall("<title>(.*)</title>", page.body)))
            except (OSError, ValueError) as error:
                got = str(error)
            yield "the stub's page comes over verified TLS", "200 You are on HTTPS", got
            yield "check finds nothing wrong", "ok", check(
                "localhost:%d" % address[1], {"path": "/exchange", "https_port": stub[1], "status": 302},
                "127.0.0.1:%d" % address[1], trust={"cadata": STUB_CERTIFICATE}, seconds=5).severity


def try_ourselves() -> Iterator[Result]:
    """End to end, then every case against a listener whose rule it needs."""
    yield from try_end_to_end()
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "a-Token_1"), "w") as file:
            file.write("a-Token_1.thumbprint")
        with contextlib.suppress(OSError):      # Windows may forbid links
            os.symlink(file.name, os.path.join(folder, "link"))
        rules = (RedirectRule(), RedirectRule(host="mail.example.com"),
                 RedirectRule(keep_path=True, allow_hosts=("mail.example.com",), health="/health", acme_dir=folder))
        for number, rule in enumerate(rules):
            with running(RedirectServer(("127.0.0.1", 0), rule=rule)) as address:
                yield from try_cases(address, rule, rules[:number])


# ---- The demo --------------------------------------------------------------------------------------------------------

class BeforeHandler(StubHandler):
    """Plain HTTP as IIS answers it before the cure."""

    def page(self) -> Tuple[int, str, Pairs]:
        return 403, "The page must be viewed over a secure channel", [
            ("You asked for it over plain HTTP. Type https:// at the beginning of the address, and try again.",
             "HTTP 403.4 - Forbidden: SSL required\nInternet Information Services")] + self.story()


class _LastRedirect:
    """An access log that keeps the target of the last redirect, for the stub's page to tell of it, once."""
    rule, port, target = RedirectRule(), 0, ""

    def write(self, line: str) -> None:
        self.target = "".join(re.findall('"[A-Z]+ ([^ ]+) [^"]*" 30', line)) or self.target

    def story(self, host: str) -> Pairs:
        name, target, self.target = re.sub(":[0-9]+$", "", host), self.target, ""
        if not target:
            return [("You came straight here: nothing was redirected.", "https://" + host)]
        return [("You typed an address without https.", "http://%s:%d%s" % (name, self.port, target)),
                ("owahttps answered with a redirect.", "HTTP/1.1 %d %s\nLocation: %s" % (
                    self.rule.status, PHRASES[self.rule.status], self.rule.location(name, target)))]


# ---- Command line ----------------------------------------------------------------------------------------------------

# Each command: what it does; its options, a row each (NAME is one of VALUES, "NAME..." is taken more than once, "=80"
# is a default); the rest of its --help.  An option of the rule has its default in RedirectRule alone.
RULE_OPTIONS = """\
--path PATH             where everybody lands ({0.path})
--keep-path             keep the path and query of the request instead
--host NAME             lead to this name instead of the requested one
--https-port PORT       lead to this port ({0.https_port})
--status CODE           301, 302, 307 or 308 ({0.status})
--allow-host NAME...    redirect this name only; may be repeated
--acme-dir DIR          serve ACME http-01 token files from here
--health PATH           answer 200 here, for health checks
""".format(RedirectRule())
USAGE = {"serve": """\
Redirect plain HTTP to HTTPS, until a signal.

--bind ADDR             listen on this address (all, IPv6 and IPv4)
--port PORT=80          listen on this port; 0 is a free one
--user NAME             become this user once the port is bound
--max-connections N=0   cap; 0 is what the file descriptor limit allows
--quiet                 no access log

The access log goes to standard output in Combined Log Format; everything else
to standard error.
examples:
  sudo owahttps.py serve --user nobody --host mail.example.com >> access.log
  owahttps.py serve --port 8080 --keep-path --status 308
""", "generate": """\
Print the rule for a server to follow: files, steps and scripts.

RECIPE=exchange2000     one of --list
--list                  say in a line what each recipe is for
--asp                   print the ASP page alone
--steps                 print the steps to click alone
--script                print the commands that do the same alone
--undo                  print the commands that take it back alone
--write DIR             write the files there instead, never over one that differs
--method METHOD         Exchange 2007 and later: redirect (Microsoft's, the default), or 403.4 (the article's)
--site SITE             IIS 5 and 6: the Web site's number (1)
--http-port NUMBER=80   the port of plain HTTP

examples:
  owahttps.py generate                        the article: page and IIS steps
  owahttps.py generate --asp --write .        the page alone, as a file
  owahttps.py generate exchange2019 --host mail.example.com --write .
  owahttps.py generate nginx --keep-path --status 308
""", "selftest": """\
Prove the redirect, end to end and case by case.

--against URL           send the cases to this redirect server instead
--quiet                 print failures and the count alone

Exit 0: all passed, 1: not all.
examples:
  owahttps.py selftest
  owahttps.py selftest --against http://127.0.0.1:8080 --keep-path
""", "check": """\
Is port 80 of these sites handled right?

TARGET...               host name, host:port or http URL
--ca-file FILE          trust these authorities, not the system's
--connect HOST:PORT     ask there, for the same name
-4                      IPv4 alone
-6                      IPv6 alone
--timeout SECONDS=10    for each request
--json                  one JSON object a target
--quiet                 print warnings and worse alone

Exit 0: ok, 1: warning, 2: critical, 3: could not tell, or wrong usage.
examples:
  owahttps.py check mail.example.com
  owahttps.py check --path /owa --connect 192.0.2.7:80 mail.example.com
""", "demo": """\
Show the redirect in a browser, on this machine alone.

--port PORT=8080        of plain HTTP, or the next that is free
--https-port PORT=8443  of HTTPS, or the next that is free
--open                  open the browser
--before                answer plain HTTP as IIS does before the cure
--cert FILE             your own certificate for the stub
--key FILE              and its key, if that is another file

examples:
  owahttps.py demo --open
  owahttps.py demo --before           the problem instead: 403.4
"""}
LEFT_OUT = {"check": ("--allow-host", "--acme-dir", "--health"),
            "demo": ("--host", "--https-port", "--allow-host", "--acme-dir", "--health")}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """One line, with the word that was probably meant."""
        wrong = re.search("(?:invalid choice: '|unrecognized arguments: )([^ =']+)", message)
        if wrong:
            import difflib
            word, names = wrong.group(1), list(USAGE) + list(RECIPES)
            options = re.findall("--[a-z0-9-]+", RULE_OPTIONS + str(USAGE))
            near = difflib.get_close_matches(word.lower(), options if word[0] == "-" else names, 1)
            if near:
                message = message.partition(" (choose")[0] + ": did you mean %s?" % near[0]
            if near == [word]:
                message = "%s does not belong there" % word
        raise RuleError(message + " (--help lists what there is)")


def _number(low: float, high: float) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        kind = type(low)
        if re.fullmatch(r"[0-9]{1,10}" + r"(\.[0-9]+)?" * (kind is float), text) and low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError("%a is not a number from %s to %s" % (text, low, high))
    return number


VALUES: Dict[str, Fields] = {       # what an option takes, by its NAME, where that is not any text
    "PORT": {"type": _number(0, 65535)}, "CODE": {"type": int}, "NUMBER": {"type": _number(1, 65535)},
    "N": {"type": _number(0, 10 ** 6)}, "SITE": {"type": _number(1, 2 ** 31 - 1), "default": 0},    # IIS 6 hashes names
    "SECONDS": {"type": _number(0.1, 9999.0)},
    "METHOD": {"choices": ("redirect", "403.4")}, "RECIPE": {"choices": list(RECIPES)}}


def _add_options(parser: Any, rows: str, unset: str = "") -> None:
    row = r"(?m)^(-\S+ )?([A-Z:]+)?(\.\.\.)?(?:=(\S+))? +(.+)$"
    for option, metavar, many, default, text in re.findall(row, rows):
        name = (option or metavar.lower()).strip()
        settings = dict({"default": default or unset}, help=text + (" (%s)" % default if default else ""))
        settings.update(dict(VALUES.get(metavar, {}), metavar=metavar) if metavar else {"action": "store_true"})
        if many and option:
            settings.update(action="append", dest=name[2:].replace("-", "_") + "s")
        elif not option:
            settings.update(nargs="+" if many else "?")
        parser.add_argument(name, **settings)


def _rule_fields(args: argparse.Namespace) -> Fields:
    """The fields of RedirectRule that the command line names."""
    return {name: value for name, value in vars(args).items() if name in RedirectRule._fields}


def _rule(fields: Fields, port: int) -> RedirectRule:
    """The rule with these fields, for plain HTTP at this port."""
    rule = RedirectRule(**fields)
    if rule.keep_path and "path" in fields:
        raise RuleError("--path %a and --keep-path: everybody lands there, or the path is kept" % rule.path)
    if rule.https_port == port:
        raise RuleError("--https-port %d is the port of plain HTTP: a loop" % port)
    return rule


def _say(text: str) -> None:
    with contextlib.suppress(OSError):      # the exit code says it too
        print("owahttps: " + text, file=sys.stderr, flush=True)


def _paint(word: str) -> str:
    """A verdict in colour, if a person looks at it: https://no-color.org"""
    colour = {"ok": 32, "note": 36, "warning": 33, "unknown": 35, "critical": 31, "FAIL": 31}[word]
    return "\033[%dm%s\033[m" % (colour, word) if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else word


def _line(verdict: str, *columns: str) -> None:
    print("  ".join([_paint(verdict) + " " * (8 - len(verdict))] + list(columns)))


def _bind_trouble(error: OSError, host: str, port: int) -> str:
    """Why a listener cannot bind, and what to do: facts of the platforms, one line."""
    where = "port %d on %s" % (port, host or "every address")
    if error.errno == errno.EACCES and sys.platform != "win32":
        return ("may not bind %s: give it a systemd unit with AmbientCapabilities=CAP_NET_BIND_SERVICE, or "
                "sysctl net.ipv4.ip_unprivileged_port_start=80, or start it as root with --user NAME" % where)
    if error.errno in (errno.EADDRINUSE, errno.EACCES):
        if sys.platform == "win32":
            return where + " is in use: see netstat -ano; PID 4 is http.sys (IIS): netsh http show servicestate"
        return "%s is in use: ss -ltnp 'sport = :%d' shows by what" % (where, port)
    return "cannot bind %s: %s; --bind takes an address of this machine" % (where, error.strerror or error)


def _next_free(port: int, server: Callable[..., Any], *settings: Any, **fields: Any) -> Any:
    """This server on loopback, at the first port from this one on that is free."""
    for candidate in range(port, min(port + 100, 65536)):
        try:
            return server(("127.0.0.1", candidate), *settings, **fields)
        except OSError as error:
            trouble = OSError(_bind_trouble(error, "127.0.0.1", candidate))
            if error.errno not in (errno.EADDRINUSE, errno.EACCES if sys.platform == "win32" else 0):
                break
    raise trouble


def _connection_cap(wanted: int) -> int:
    """As many connections as wanted, else what some 50 MB hold while they wait; no more than file descriptors allow."""
    try:
        import resource
    except ImportError:
        return min(wanted or 500, 500)      # select() on Windows takes 512 sockets
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return min(wanted or 16384, max(8, soft - 64) if soft > 0 else 10 ** 6)     # 64 for files, and who is new


def _drop_to(user: str) -> None:
    """Become this user, for good."""
    try:
        import pwd
        entry = pwd.getpwnam(user)
        os.initgroups(user, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    except (ImportError, KeyError):
        raise OSError("there is no user %a here" % user) from None
    except OSError as error:
        raise OSError("cannot become user %a: %s; that takes root" % (user, error.strerror)) from None


def _on_signal(stop: Callable[[], Any]) -> None:
    def handle(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_IGN)       # a second one would kill the interpreter on its way out
        stop()
    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):      # the last one is Windows' Ctrl-Break
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handle)


def _warnings(rule: RedirectRule, host: str) -> Iterator[str]:
    """What will hurt later, said once at the start."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        yield "runs as root: --user NAME gives that up once the port is bound"
    if rule.status in (301, 308) and (host == "::1" or host.startswith("127.")):
        yield "browsers keep a %d for good, for localhost too: 302 or 307 can be taken back" % rule.status
    if rule.https_port != 443 and not rule.acme_dir:
        yield "Let's Encrypt follows redirects to ports 80 and 443 alone: --acme-dir serves its tokens here"


def command_serve(args: argparse.Namespace) -> int:
    rule = _rule(_rule_fields(args), args.port)
    if rule.acme_dir and not os.path.isdir(rule.acme_dir):
        raise RuleError("--acme-dir %a is not a folder" % rule.acme_dir)
    while os.open(os.devnull, os.O_RDWR) < 2:       # else a closed one's number goes to a socket, and the log there
        pass
    try:
        server = RedirectServer((args.bind.strip("[]"), args.port), rule=rule,
                                max_connections=_connection_cap(args.max_connections))
    except OSError as error:
        raise OSError(_bind_trouble(error, args.bind, args.port)) from None
    with server:
        if args.user:
            _drop_to(args.user)
        if rule.acme_dir and not os.access(rule.acme_dir, os.R_OK | os.X_OK):
            raise OSError("--acme-dir %a cannot be read%s" % (rule.acme_dir, args.user and " by user " + args.user))
        _on_signal(server.stop)
        server.error_log = errors = Log(2, tell=lambda _: None)

        def say(text: str) -> None:
            errors.write("owahttps: %s\n" % text)
        host, port = str(server.server_address[0]), server.server_port
        say("listening on %s port %d; http://HOST/ goes to https://%s%s (%d)" % (
            "[%s]" % host if ":" in host else host, port, rule.authority("HOST"),
            "/, path kept" if rule.keep_path else rule.path, rule.status))
        for warning in _warnings(rule, host):
            say("warning: " + warning)
        log = Log(1, tell=say)
        server.access_log = None if args.quiet else log
        server.serve_forever()
        log.close()
        errors.close()
    return 0


def _write_files(folder: str, parts: List[Part]) -> None:
    """Write the parts that are files; nothing at all if one would take the place of a file that says something else."""
    if not os.path.isdir(folder):
        raise OSError("--write %a is not a folder" % folder)
    files, there = {}, []
    for part in parts:
        if part.file:
            path = os.path.join(folder, part.file)
            newline = "\r\n" if part.file.endswith((".asp", ".cmd")) else "\n"
            files[path] = part.text.replace("\n", newline).encode("ascii")
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                if file.read() != files[path]:
                    raise OSError("%s says something else: move it, or write elsewhere" % path)
                there.append(path)
    if not files:
        raise RuleError("--write: none of these parts is a file")
    for path, data in files.items():
        if path not in there:
            with open(path, "xb") as file:
                file.write(data)
        print(os.path.basename(path))       # the folder's name may be beyond a code page


def command_generate(args: argparse.Namespace) -> int:
    if args.list:
        for name, what in RECIPES.items():
            print("%-14s%s" % (name, what))
        return 0
    fields = _rule_fields(args)
    if args.recipe in EXCHANGE and "article" not in EXCHANGE[args.recipe][1] and "keep_path" not in fields:
        fields.setdefault("path", "/owa")       # since Exchange 2007
    rule = _rule(fields, args.http_port)
    if args.recipe in EXCHANGE:
        parts = exchange_recipe(args.recipe, rule, args.http_port, args.method, args.site)
    else:
        _refuse(args.recipe, (args.method or args.site, "is no Exchange: it takes no --method and no --site"))
        parts = server_recipe(args.recipe, rule, args.http_port)
    asked = [name for name in ("asp", "steps", "script", "undo") if getattr(args, name)]
    if asked:
        parts = [part for part in parts if part.name in asked]
        if not parts:
            raise RuleError("%s has no such part: %s" % (args.recipe, ", ".join(asked)))
    if args.write:
        _write_files(args.write, parts)
        return 0
    for part in parts:
        if len(parts) > 1:
            print("---- %s ----\n" % (part.file or part.name))
            print(part.text)
        else:
            # cmd.exe would not find every label in a file with lone LFs.
            crlf = part.file.endswith(".cmd") and os.linesep == "\n" and not sys.stdout.isatty()
            print(part.text.replace("\n", "\r\n") if crlf else part.text, end="")
    return 0


def _report(results: Iterable[Result], quiet: bool) -> int:
    """Print a line for each result, and a count; 1 if any failed."""
    count = failed = 0
    for what, expected, got in results:
        good = got in expected.split("|")
        count += 1
        if not good:
            failed += 1
            _line("FAIL", "%s: expected %s, got %s" % (what, expected, _log_escape(got, 200)))
        elif not quiet:
            _line("ok", what)
    print("%d checks, %d failed" % (count, failed))
    return 1 if failed else 0


def command_selftest(args: argparse.Namespace) -> int:
    if not args.against:
        if _rule_fields(args):
            raise RuleError("the rule options describe the server that --against names")
        return _report(try_ourselves(), args.quiet)
    site = _site(args.against)
    try:
        socket.create_connection((site.name.strip("[]"), site.port), 5).close()
    except OSError as error:
        raise OSError("%s gives no answer: %s" % (site, _reason(error))) from None
    return _report(try_cases((site.name.strip("[]"), site.port), _rule(_rule_fields(args), 0)), args.quiet)


def command_check(args: argparse.Namespace) -> int:
    from concurrent.futures import ThreadPoolExecutor, wait
    import json
    fields, trust = _rule_fields(args), {"cafile": args.ca_file} if args.ca_file else {}
    try:
        ssl.create_default_context(**trust)
    except OSError as error:
        raise RuleError("--ca-file %a: %s" % (args.ca_file, _pem_trouble(error))) from None
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # else Ctrl-C would wait for all that is asked and to be asked
    ipv4, ipv6 = vars(args)["4"], vars(args)["6"]
    family = 0 if ipv4 == ipv6 else socket.AF_INET if ipv4 else socket.AF_INET6
    RedirectRule(**fields)
    for target in filter(None, args.target + [args.connect]):
        _site(target)
    with ThreadPoolExecutor(16) as pool:
        waiting = [pool.submit(check, target, fields, args.connect, family, trust, args.timeout)
                   for target in args.target]
        while sys.stderr.isatty() and wait(waiting, 1).not_done:
            done = sum(future.done() for future in waiting)
            print("%d of %d checked" % (done, len(waiting)), end="\r", file=sys.stderr, flush=True)
        reports = [future.result() for future in waiting]
    shown = SEVERITIES[SEVERITIES.index("warning"):] if args.quiet else SEVERITIES
    for report in reports:
        if args.json:
            print(json.dumps(dict(report._asdict(), hops=[hop._asdict() for hop in report.hops],
                                  findings=[finding._asdict() for finding in report.findings])))
        elif report.severity in shown:
            _line(report.severity, _log_escape(report.target))
            for hop in () if args.quiet else report.hops:
                arrow = " -> " + hop.location if hop.location else ""
                print("  %4d ms  %3s  %s%s" % (hop.milliseconds, hop.status or "-", hop.url, arrow))
            for finding in report.findings:
                if finding.severity in shown:
                    print("  ", end="")
                    _line(finding.severity, finding.id, finding.text)
    return EXIT_CODES[max((report.severity for report in reports), key=SEVERITIES.index)]


def command_demo(args: argparse.Namespace) -> int:
    over = threading.Event()
    _on_signal(over.set)
    last = _LastRedirect()
    if args.key and not args.cert:
        raise RuleError("--key %a is the key of no --cert" % args.key)
    with running(_next_free(args.https_port, StubServer, args.cert, args.key, last.story)) as (_, https_port):
        last.rule = rule = _rule(dict(_rule_fields(args), https_port=https_port), 0)
        if args.before:
            server = _next_free(args.port, _ThreadingServer, BeforeHandler)
            server.story = lambda _: [("In this demo, type:", rule.location("localhost", "/"))]
        else:
            server = _next_free(args.port, RedirectServer, rule=rule, access_log=last)
        last.port = server.server_port
        url = "http://localhost:%d" % last.port
        with running(server):
            print("%s/  %s %s" % (url, "answers 403.4, as IIS does; the page is at" if args.before else "->",
                                  rule.location("localhost", "/")), flush=True)
            if not args.cert:
                trust = '--cacert "%s"' % sys.argv[0] if os.path.isfile(sys.argv[0]) else "-k"
                _say("browsers warn of the certificate; curl -iL %s %s/" % (trust, url))
            _say("Ctrl-C ends it")
            if args.open:
                import webbrowser
                if not webbrowser.open(url + "/"):
                    _say("no browser found: open %s/ in yours" % url)
            while not over.wait(0.5):       # Windows would not let Ctrl-C through a wait without an end
                pass
    return 0


def build_parser(argv: List[str]) -> _Parser:
    """The parser for this command line: of the command it begins with, else of all."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="owahttps.py", description=__doc__, formatter_class=layout)
    parser.add_argument("--version", action="version", version="owahttps " + __version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    commands.required = True
    for name in argv[:1] if argv[0] in USAGE else USAGE:
        what, rows, rest = USAGE[name].split("\n\n", 2)
        words = ["[%s]" % word if default else word for word, default in re.findall(r"(?m)^([A-Z]+[.]*)(=?)", rows)]
        usage = " ".join(["%(prog)s [options]"] + words)
        command = commands.add_parser(name, usage=usage, help=what, description=what, epilog=rest,
                                      formatter_class=layout)
        _add_options(command, rows)
        rule = [row for row in RULE_OPTIONS.splitlines(True) if row.split()[0] not in LEFT_OUT.get(name, ())]
        _add_options(command.add_argument_group("the rule"), "".join(rule), argparse.SUPPRESS)
    return parser


READER_GONE = (errno.EPIPE, errno.EINVAL) if sys.platform == "win32" else (errno.EPIPE,)


def main(argv: Optional[List[str]] = None) -> int:
    argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    for name in ("stderr", "stdout"):
        if not getattr(sys, name):      # Python's None for one that was closed
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", closefd=False))
            if name == "stdout":
                _say("standard output is closed: nobody will see what goes there")
    wrong_usage, failed = (3, 3) if argv[0] == "check" else (2, 1)
    run = {"serve": command_serve, "generate": command_generate, "selftest": command_selftest, "check": command_check,
           "demo": command_demo}
    try:
        if any(re.fullmatch("(--[a-z-]+=)?", word) for word in argv):
            raise RuleError("an argument is empty: a variable that is not set?")
        args = build_parser(argv).parse_args(argv)
        code = run[args.command](args)
        sys.stdout.flush()
        return code
    except ValueError as error:     # RuleError, or a target that is none
        _say("error: %s" % error)
        return wrong_usage
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.errno not in READER_GONE:
            _say("error: %s%s" % (error.strerror or error, ": %s" % error.filename if error.filename else ""))
        try:
            sys.stdout.flush()
        except OSError:         # what is left would fail once more, in the interpreter's own flush
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
