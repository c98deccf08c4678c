#!/usr/bin/env python3
# /// script
# requires-python = ">=3.6"
# ///
"""Redirect plain HTTP to HTTPS: http://HOST/ leads to https://HOST/exchange.

This is the fix of Microsoft's article Q279681 ("How to Force SSL Encryption
for an OWA 2000 Client"), for any machine.  Copy this one file there and run
it: it needs CPython 3.6 or newer and nothing else.

  sudo python3 owahttps.py serve --user nobody        to https://HOST/exchange
  python3 owahttps.py serve --port 8080 --keep-path   to the same path
  python3 owahttps.py generate                        the article: page, steps
  python3 owahttps.py selftest                        prove the redirect, here
  python3 owahttps.py check mail.example.com          is port 80 there right?
  python3 owahttps.py demo --open                     show it in a browser

Run owahttps.py COMMAND --help for all options of a command.
"""

# A map of this file.  Each function is defined below the ones that it uses.
#
#   Part one: the article
#     The rule        where plain HTTP goes: a RedirectRule
#     The answer      one request head in, one answer out; no I/O
#     The log         lines that never make the listener wait
#     The listener    a handler and a server around that answer
#     The article     the ASP page and the 18 steps in IIS
#     The stub        an HTTPS server on localhost
#     The self-test   listener and stub, and a table of hostile requests
#     The demo        listener and stub, for a person with a browser
#   Part two: beyond the article
#     Recipes         the same rule for newer Exchange and for other servers
#     The check       the rule verified on a live site
#   Command line      the arguments of each command, and what it does

import argparse
import contextlib
import errno
import http.client
import json
import os
import re
import select
import selectors
import shutil
import signal
import socket
import ssl
import stat
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
from collections import OrderedDict
from email.utils import formatdate, mktime_tz, parsedate_tz
from functools import lru_cache
from glob import glob
from html import escape
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import AddressValueError, IPv4Address, IPv6Address, ip_address
from socketserver import TCPServer, ThreadingMixIn
from typing import (
    Any,
    Callable,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
)
from urllib.parse import unquote, urljoin, urlsplit

__all__ = [
    "Answer",
    "Finding",
    "HostError",
    "RedirectHandler",
    "RedirectRule",
    "RedirectServer",
    "Report",
    "RuleError",
    "answer",
    "asp_page",
    "check",
    "server_name",
]
__version__ = "2.0"

Address = Tuple[str, int]  # a host and a port, as sockets take them


# ======== Part one: the article =======================================================


# ---- The rule ------------------------------------------------------------------------


class RuleError(ValueError):
    """The rule is invalid, or a recipe cannot express it; the message is one line."""


class HostError(RuleError):
    """The text is not a server name."""


# RFC 9110 section 7.2: Host = uri-host [ ":" port ].  Of the hosts that RFC 3986 allows, only
# those that a certificate can name are accepted: labels of letters, digits and inner "-" and "_",
# or an IP address.  There is no userinfo, no percent-encoding and no IPv6 zone.
LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
AUTHORITY = re.compile(rf"(?:({LABEL}(?:\.{LABEL})*)\.?|(\[[0-9A-Fa-f:.]+\]))(?::([0-9]{{0,5}}))?")
# WHATWG URL section 3.5: if the last label of a host is a number, a browser treats the host as an
# IPv4 address, and rejects it if it is not a valid one.
ENDS_IN_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")
# CPython before 3.9.5 accepts leading zeros in an IPv4 address; later versions reject them.
LEADING_ZERO = re.compile(r"(?:^|[:.])0[0-9]+\.|\.0[0-9]+$")
# RFC 3986 section 2.3, the unreserved characters: every server's configuration, cmd.exe and
# VBScript take them literally.
RULE_PATH = re.compile(r"/[A-Za-z0-9._~/-]*")
# Paths that programs ask for, in upper or lower case: RFC 8615 (certificate authorities, MTA-STS
# and others) and Autodiscover.  They are always kept: these clients want one particular file.
MACHINE_PATH = re.compile(r"/(?i:\.well-known|autodiscover)/")
# In a request target, everything except these is percent-encoded, and so is a "%" that does not
# begin an encoded byte (RFC 3986 sections 3.3 and 3.4).
IN_URL = r"A-Za-z0-9._~:/?@!$&'()*+,;=%-"
LONE_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")
OUTSIDE_URL = re.compile(f"[^{IN_URL}]|{LONE_PERCENT.pattern}")
PERCENT_ENCODED = {
    code: f"%{code:02X}" for code in range(256) if not re.match(f"[{IN_URL}]", chr(code))
}
STATUSES = (301, 302, 307, 308)
PERMANENT = (301, 308)


def is_address(host: str) -> bool:
    """Whether this is an IPv4 address or an IPv6 address without brackets."""
    if LEADING_ZERO.search(host):
        return False
    try:
        IPv6Address(host) if ":" in host else IPv4Address(host)
    except AddressValueError:
        return False
    return True


def split_authority(text: str) -> Tuple[str, int]:
    """Take "name[:port]" apart: the server name, and the port, 0 where none is given.

    The name is in lower case and without a trailing dot; IPv6 keeps its brackets.

    >>> split_authority("Mail.Example.com.:8080")
    ('mail.example.com', 8080)

    Raises HostError for anything other than a name or an address with an optional port.
    """
    match = AUTHORITY.fullmatch(text)
    if not match:
        raise HostError(
            f"{text[:300]!a} is not a server name, such as mail.example.com or [2001:db8::1] "
            "(no https:// and no path; other letters as xn--)"
        )
    name = (match.group(1) or match.group(2)).lower()
    if len(name) > 253:
        raise HostError(f"{text[:300]!a} is longer than the 253 characters of a server name")
    numeric = match.group(2) or ENDS_IN_NUMBER.fullmatch(name)
    if numeric and not is_address(name.strip("[]")):
        raise HostError(f"{text!a} is not an IP address")
    port = int(match.group(3) or 0)
    if port > 65535 or (match.group(3) and port == 0):
        raise HostError(f"{text!a} has a port that is not in 1-65535")
    return name, port


@lru_cache(maxsize=1024)
def server_name(authority: str) -> str:
    """Return the server name of a Host field or another authority, as split_authority() does."""
    return split_authority(authority)[0]


def with_port(name: str, port: int, default: int) -> str:
    """Return name[:port], without the port where it is the default of the scheme."""
    return name if port == default else f"{name}:{port}"


def host_of_rule(text: str) -> str:
    """Return the server name; raise HostError if it has a port."""
    name, port = split_authority(text)
    if port:
        raise HostError(f"{text!a} has a port: give only the name here; use --https-port")
    return name


def check_text(field: str, value: Any) -> None:
    """Raise RuleError for a value that is not a str."""
    if not isinstance(value, str):
        raise RuleError(f"{field} {value!a} is not text")


def check_number(field: str, value: Any) -> None:
    """Raise RuleError for a value that is not an int."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise RuleError(f"{field} {value!a} is not a whole number")


def check_list(field: str, values: Any) -> None:
    """Raise RuleError for a value that is not a list of str."""
    if not isinstance(values, (list, tuple, set, frozenset)):
        raise RuleError(f"{field} {values!a} is not a list")
    for value in values:
        check_text(field, value)


def check_path(field: str, path: Any) -> None:
    """Raise RuleError for a path that a rule cannot have."""
    check_text(field, path)
    if not RULE_PATH.fullmatch(path):
        raise RuleError(
            f"{field} {path!a} does not begin with '/', "
            "or has characters other than A-Z a-z 0-9 . _ ~ - /"
        )


def hosts_of_rule(host: str, allow_hosts: Iterable[str]) -> Tuple[str, FrozenSet[str]]:
    """Return the fixed host, "" for none, and the names that are allowed; raises RuleError."""
    check_text("host", host)
    check_list("allow_hosts", allow_hosts)
    host = host_of_rule(host) if host else ""
    allowed = {host_of_rule(name) for name in allow_hosts}
    if host and allowed:
        allowed.add(host)  # the host itself is always allowed
    return host, frozenset(allowed)


def health_of_rule(health: str, path: str) -> str:
    """Return the path of health checks, "" for none; raises RuleError."""
    check_text("health", health)
    if not health:
        return ""
    check_path("health", health)
    if health == "/":
        raise RuleError("health '/' is what people type: it has to redirect")
    if health == path:
        raise RuleError(f"health {health!a} is where every request leads")
    if "//" in health:  # servers merge slashes, each in its own way
        raise RuleError(f"health {health!a} has '//'")
    return health


def api_of_rule(api: Sequence[str]) -> Tuple[str, ...]:
    """Return the paths of APIs, in lower case and without a last slash; raises RuleError."""
    check_list("api", api)
    for path in api:
        check_path("api", path)
        if path == "/":
            raise RuleError("api '/' would leave nothing to redirect")
        if "//" in path:  # servers merge slashes, each in its own way
            raise RuleError(f"api {path!a} has '//'")
    return tuple(path.rstrip("/").lower() for path in api)


def percent_encode(target: str) -> str:
    """Return a request target with everything percent-encoded that a URL cannot contain."""
    if OUTSIDE_URL.search(target):  # most targets need nothing, which search() tells fastest
        target = LONE_PERCENT.sub("%25", target).translate(PERCENT_ENCODED)
    return target


class RuleFields(NamedTuple):
    """The fields of a RedirectRule: a NamedTuple cannot check its values itself."""

    path: str
    host: str
    https_port: int
    status: int
    keep_path: bool
    allow_hosts: FrozenSet[str]
    health: str
    acme_dir: str
    api: Tuple[str, ...]


class RedirectRule(RuleFields):
    """Where plain HTTP goes: a request for server name H goes to https://H[:https_port]path.

    path         where every request leads
    host         lead to this name instead of the requested one ("": the requested one)
    https_port   lead to this port
    status       301, 302, 307 or 308; 302 is what the article's Response.Redirect sends, and
                 browsers do not cache it
    keep_path    keep the path and query of the request, instead of `path`
    allow_hosts  the only names that are redirected (empty: every name); host is one of them
    health       a path that answers 200 ("": none)
    acme_dir     a folder of ACME http-01 token files, which are served ("": none)
    api          paths below which the answer is 403: a client of an API would follow a
                 redirect each time, and send its secret in the clear each time

    RuleError says in one line why a rule is invalid.
    """

    __slots__ = ()

    def __new__(
        cls,
        path: str = "/exchange",
        host: str = "",
        https_port: int = 443,
        status: int = 302,
        keep_path: bool = False,
        allow_hosts: Iterable[str] = (),
        health: str = "",
        acme_dir: str = "",
        api: Sequence[str] = (),
    ) -> "RedirectRule":
        check_path("path", path)
        check_text("acme_dir", acme_dir)
        check_number("https_port", https_port)
        check_number("status", status)
        if not 1 <= https_port <= 65535:
            raise RuleError(f"https port {https_port} is not in 1-65535")
        if status not in STATUSES:
            raise RuleError(f"status {int(status)} is not one of 301, 302, 307, 308")
        host, allowed = hosts_of_rule(host, allow_hosts)
        return super().__new__(
            cls,
            path,
            host,
            int(https_port),
            int(status),
            bool(keep_path),
            allowed,
            health_of_rule(health, "" if keep_path else path),
            acme_dir,
            api_of_rule(api),
        )

    @classmethod
    def _make(cls, fields: Iterable[Any]) -> "RedirectRule":  # type: ignore[override]
        """Make a rule from its fields in order; _replace() calls this, so it validates too."""
        return cls(*fields)

    def authority(self, name: str) -> str:
        """Return host and port of the target, for a request for this server name."""
        return with_port(self.host or name, self.https_port, 443)

    def keeps_path(self, target: str) -> bool:
        """Return whether this request target (path and query) keeps its path."""
        return self.keep_path or MACHINE_PATH.match(target) is not None

    def location(self, name: str, target: str) -> str:
        """Return the Location for a request for this server name and request target.

        >>> RedirectRule(keep_path=True).location("mail.example.com", '/a"b?c')
        'https://mail.example.com/a%22b?c'
        """
        path = percent_encode(target) if self.keeps_path(target) else self.path
        return f"https://{self.authority(name)}{path}"

    def is_api(self, target: str) -> bool:
        """Return whether this request target is one of `api` or below one, in any case."""
        path = target.partition("?")[0].lower()
        return any(path == one or path.startswith(one + "/") for one in self.api)


def command_options(rule: RedirectRule) -> str:
    """Return the rule as command line options, each with a space before it."""
    default = RedirectRule()
    words = ""
    if rule.path != default.path:
        words += f" --path {rule.path}"
    if rule.keep_path:
        words += " --keep-path"
    if rule.host:
        words += f" --host {rule.host}"
    if rule.https_port != default.https_port:
        words += f" --https-port {rule.https_port}"
    if rule.status != default.status:
        words += f" --status {rule.status}"
    words += "".join(f" --allow-host {name}" for name in sorted(rule.allow_hosts))
    words += "".join(f" --api {path}" for path in rule.api)
    if rule.acme_dir:
        words += f" --acme-dir {rule.acme_dir}"
    if rule.health:
        words += f" --health {rule.health}"
    return words


# ---- The answer ----------------------------------------------------------------------

MAX_TARGET = 8 * 1024  # bytes of a request target; the answer to a longer one is 414
MAX_HEAD = 32 * 1024  # bytes of a request head; the answer to a longer one is 431
MAX_TOKEN_FILE = 64 * 1024  # bytes of an ACME token's file
MAX_LOGGED = 1000  # characters of each field of a log line

# Not http.HTTPStatus: its phrases differ between versions of Python, and ours are RFC 9110's.
PHRASES = {
    200: "OK",
    204: "No Content",
    301: "Moved Permanently",
    302: "Found",
    307: "Temporary Redirect",
    308: "Permanent Redirect",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    414: "URI Too Long",
    421: "Misdirected Request",
    431: "Request Header Fields Too Large",
    505: "HTTP Version Not Supported",
}
NO_NAME = "Host or request target is not one valid server name with an optional port"
LOOP = (
    "redirect loop: a proxy says that this request came over HTTPS; "
    "forward HTTPS to the application, and only plain HTTP to this redirect"
)
API = "this API is HTTPS only: any secret in this request was sent in the clear"
ACME_PREFIX = "/.well-known/acme-challenge/"

# RFC 9110 section 5.6.2: token = 1*tchar.  No method in use has more than 20 characters.
TCHAR = r"[!#$%&'*+.^_`|~0-9A-Za-z-]"
METHOD = TCHAR + "{1,50}"
# RFC 9112 section 3: request-line = method SP request-target SP HTTP-version.  Section 2.2: one
# empty line before it is tolerated.  8-bit bytes in the target are not in the grammar, but
# browsers have sent them; a Location has them percent-encoded.
REQUEST_LINE = rf"(?:\r\n)?({METHOD}) ([!-~\x80-\xff]{{1,{MAX_TARGET}}}) HTTP/1\.([0-9])\r\n"
# RFC 9112 section 5: field-line = field-name ":" OWS field-value OWS, and no obs-fold.
WHOLE_HEAD = re.compile(rf"{REQUEST_LINE}(?:{TCHAR}+:[\t -~\x80-\xff]*\r\n)*\r\n")
REQUEST_LINE_BYTES = re.compile(REQUEST_LINE.encode("latin-1"))
# How a proxy that has terminated TLS says so.  The first element of a list counts: it is about
# the browser's connection.
LOOP_SIGNS = {
    "x-forwarded-proto": re.compile(r"(?i)(https|wss)[\t ]*(,|$)"),
    "cloudfront-forwarded-proto": re.compile(r"(?i)https$"),
    "forwarded": re.compile(r'(?i)[^,]*\bproto="?(https|wss)\b'),  # RFC 7239 section 5.4
    "x-forwarded-ssl": re.compile(r"(?i)on$"),
    "front-end-https": re.compile(r"(?i)on$"),  # Microsoft's own, for Outlook Web Access
    "x-arr-ssl": re.compile(r"."),  # IIS's Application Request Routing: the certificate
}
# The fields that an answer depends on, and those of a log line; the usual ones are first, which
# finds them fastest.  The lookahead skips at once each line that begins with any other letter, and
# re.ASCII ignores case faster.
FIELD_NAMES = ["host", "user-agent", "connection", "referer", *LOOP_SIGNS]
FIELD_NAMES += ["content-length", "transfer-encoding"]
INITIALS = "".join(sorted({name[0] + name[0].upper() for name in FIELD_NAMES}))
FIELD = re.compile(rf"\n(?=[{INITIALS}])((?i:{'|'.join(FIELD_NAMES)})):[\t ]*([^\r]*)", re.ASCII)
# RFC 9112 section 3.2.2: absolute-form, as a client sends it to a proxy.
ABSOLUTE_FORM = re.compile(r"(?i:http(s)?)://([^/?#]*)(.*)")
# What a log line writes as \xHH: all but printable ASCII, and quotes and backslashes.
LOG_ESCAPES = {
    code: f"\\x{code:02X}" for code in range(256) if not re.match(r"[ !#-\[\]-~]", chr(code))
}
NOT_LOGGABLE = bytes(LOG_ESCAPES)

# What is wrong with a head: the first pattern that matches decides, and the last always matches.
FAULTS = [
    (re.compile(pattern, re.DOTALL), status, reason)
    for pattern, status, reason in (
        (r"\x16", 400, "TLS on the plain HTTP port"),
        (r"PROXY ", 400, "PROXY protocol: this port takes only HTTP"),
        (r"\r\n\r\n", 400, "no request line (version 2 of the PROXY protocol begins like this)"),
        (rf"(?:\r\n)?{METHOD} [^\n ]{{{MAX_TARGET + 1}}}", 414, "request target too long"),
        (rf".{{{MAX_HEAD + 1}}}", 431, "request head too long"),
        (rf"(?:\r\n)?{METHOD} [^\r\n ]+ HTTP/[02-9]\.[0-9]\r\n", 505, "not HTTP/1"),
        (r".*[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", 400, "control byte"),
        (r".*(?:\r(?!\n)|(?<!\r)\n)", 400, "lone CR or LF"),
        (rf"(?!{REQUEST_LINE})", 400, "malformed request line"),
        (r".*\n[\t ]", 400, "folded field line"),
        (r"", 400, "malformed field line"),
    )
]


class Refusal(Exception):
    """The answer is an error: Refusal(status, reason).  The reason never quotes the request."""


class Answer(NamedTuple):
    """The answer to one request head."""

    response: bytes  # b"": close without an answer
    status: int
    location: str
    target: str  # path and query that were asked for, "" where the request was refused early
    close: bool  # whether the connection ends after it
    more_to_come: bool  # whether the client may send more, which has to be read first
    log: str  # its line in the access log, from the request line on
    refusal: str  # why the request was refused, or ""


def log_escape(text: str, most: int = MAX_LOGGED) -> str:
    """Return printable ASCII without quotes and backslashes, anything else as \\xHH."""
    escaped = text[:most].translate(LOG_ESCAPES)
    return escaped.encode("ascii", "backslashreplace").decode("ascii")[:most]


def log_line(line: str, status: int, size: int, fields: Dict[str, str]) -> str:
    """Return a line of the Combined Log Format, from the request line on."""
    referer, agent = fields.get("referer") or "-", fields.get("user-agent") or "-"
    logged = f"{line}{referer}{agent}".encode("latin-1")
    # Usually there is nothing to escape, and translate() finds that out faster than a pattern.
    if len(logged.translate(None, NOT_LOGGABLE)) < len(logged) or len(logged) > MAX_LOGGED:
        line, referer, agent = log_escape(line), log_escape(referer), log_escape(agent)
    return f'"{line}" {status} {size} "{referer}" "{agent}"'


def read_fields(text: str) -> Dict[str, str]:
    """Return the fields of a head that an answer depends on, their names in lower case.

    Several of one name are joined into a list (RFC 9110 section 5.3), so two Host fields are not
    a valid server name.
    """
    fields: Dict[str, str] = {}
    for name, value in FIELD.findall(text):
        name = name.lower()
        value = value.rstrip("\t ")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields


def has_body(fields: Dict[str, str]) -> bool:
    """Check the framing of a request, and return whether a body follows (RFC 9112 section 6.3)."""
    length, coding = fields.get("content-length"), fields.get("transfer-encoding")
    if coding is None:
        if length is None:
            return False
        if not re.fullmatch("[0-9]+", length):
            raise Refusal(400, "Content-Length is not one number")
        return length.strip("0") != ""  # not int(), which takes at most 4,300 digits
    if length is not None:
        raise Refusal(400, "both Content-Length and Transfer-Encoding")
    codings = [one.strip("\t ").lower() for one in coding.split(",")]
    if codings.count("chunked") != 1 or codings[-1] != "chunked":
        raise Refusal(400, "Transfer-Encoding does not end in chunked, once")
    return True


def is_loop(fields: Dict[str, str]) -> bool:
    """Return whether a proxy says that it has terminated TLS: a redirect would come back here."""
    if LOOP_SIGNS.keys().isdisjoint(fields):
        return False
    return any(sign.match(fields.get(name, "")) for name, sign in LOOP_SIGNS.items())


def fault_of(head: str) -> Refusal:
    """Return what is wrong with a malformed head."""
    status, reason = next(fault[1:] for fault in FAULTS if fault[0].match(head))
    return Refusal(status, reason)


def effective_target(method: str, host: str, target: str) -> Tuple[str, str]:
    """Return the server name that a request target means, and its path and query, or "*"."""
    if not target.startswith("/") and (method, target) != ("OPTIONS", "*"):
        absolute = ABSOLUTE_FORM.fullmatch(target)
        if not absolute:
            raise Refusal(400, "request target is not a path")
        if absolute.group(1):  # RFC 9110 section 7.4: an https URI needs a secure connection
            raise Refusal(421, LOOP)
        # RFC 9112 section 3.2.2: its authority replaces the Host field.
        host, target = server_name(absolute.group(2)), absolute.group(3)
        if not target.startswith("/"):
            target = "/" + target
    if "#" in target:
        raise Refusal(400, "request target has a fragment")
    return host, target


def read_request(head: str, fields: Dict[str, str]) -> Tuple[str, str, str, bool, bool]:
    """Take a request head apart; raises Refusal or HostError.

    Returns the method, the server name ("" where the request has none), path and query (or "*"),
    whether a body follows, and whether the connection ends after the answer.
    """
    match = WHOLE_HEAD.fullmatch(head)
    if not match or len(head) > MAX_HEAD:
        raise fault_of(head)
    method, target, minor = match.groups()
    body = has_body(fields)
    if "host" not in fields and minor != "0":
        raise Refusal(400, "no Host field")  # RFC 9112 section 3.2
    name = server_name(fields["host"]) if "host" in fields else ""
    if method in ("CONNECT", "TRACE"):
        raise Refusal(405, f"{method} is not allowed")
    name, target = effective_target(method, name, target)
    # A body is never read as such.  The connection ends after the answer, so that no body can be
    # taken for a request.  It also ends for HTTP/1.0, and if "close" is part of another option.
    close = body or minor == "0" or "close" in fields.get("connection", "").lower()
    return method, name, target, body, close


def no_token(token: str) -> Optional[bytes]:
    """Find no file for any ACME token."""


def decide(
    method: str,
    name: str,
    target: str,
    looped: bool,
    rule: RedirectRule,
    find_token: Callable[[str], Optional[bytes]],
) -> Tuple[int, str, str]:
    """Return status, Location and text of the answer; raises Refusal."""
    if target == "*":
        return 204, "", ""
    if (rule.acme_dir or rule.health) and method in ("GET", "HEAD", "OPTIONS"):
        path = target.partition("?")[0]
        if rule.acme_dir and path.startswith(ACME_PREFIX):
            token = path[len(ACME_PREFIX) :]
            data = find_token(token) if re.fullmatch("[A-Za-z0-9_-]+", token) else None
            return (404, "", "") if data is None else (200, "", data.decode("latin-1"))
        if path == rule.health:
            return 200, "", "OK\n"
    if looped:
        raise Refusal(421, LOOP)
    if not name and not rule.host:
        raise Refusal(400, "no Host field, and the redirect has no --host")
    if rule.allow_hosts and (name or rule.host) not in rule.allow_hosts:
        raise Refusal(421, "this server name is not served here")
    if rule.api and rule.is_api(target):
        raise Refusal(403, API)
    return rule.status, rule.location(name, target), ""


def page(status: int, location: str, message: str) -> str:
    """Return an HTML page; the message is our own text, and needs no escaping."""
    title, paragraph = f"{status} {PHRASES[status]}", message
    if location:  # IIS's own words
        title = "Object moved"
        paragraph = f'This object may be found <a href="{escape(location)}">here</a>.'
    return f"<!DOCTYPE html>\n<title>{title}</title>\n<h1>{title}</h1>\n<p>{paragraph}\n"


def render(
    status: int, location: str, message: str, head_only: bool, close: bool, date: str
) -> Tuple[bytes, int]:
    """Return a response, and the number of bytes of its body."""
    body = message if status in (200, 204, 404) else page(status, location, message)
    head = f"HTTP/1.1 {status} {PHRASES[status]}\r\nDate: {date}\r\nServer: owahttps\r\n"
    if location:
        head += f"Location: {location}\r\n"
    if status in PERMANENT:  # browsers cache these without limit: let a wrong one expire
        head += "Cache-Control: max-age=86400\r\n"
    if status in (204, 405):
        head += "Allow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS\r\n"
    if status != 204:
        kind = "plain" if status in (200, 404) else "html"
        head += f"Content-Type: text/{kind}; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
    if close:
        head += "Connection: close\r\n"
    if head_only:
        body = ""
    return f"{head}\r\n{body}".encode("latin-1"), len(body)


# Requests for one Location in one second share a response.
shared_render = lru_cache(maxsize=512)(render)


def answer(
    head: bytes,
    rule: RedirectRule,
    date: str,
    find_token: Callable[[str], Optional[bytes]] = no_token,
    last: bool = False,
) -> Answer:
    """Answer one request head: a whole one, or one for which is_refused_early() is true.

    date        the Date field, the first of dates()
    find_token  returns the file of an ACME token, or None
    last        whether the connection ends after this answer, whatever the request wants

    Percent-encoding is never decoded.  The bytes of a Location come from the rule, from
    server_name() and, percent-encoded, from the request target.
    """
    text = head.decode("latin-1")
    # The request line; an empty one is tolerated before it.
    line = text.partition("\r\n")[0] or text[2:].partition("\r\n")[0]
    fields = read_fields(text)
    location = target = refusal = ""
    try:
        method, name, target, more_to_come, close = read_request(text, fields)
        status, location, message = decide(method, name, target, is_loop(fields), rule, find_token)
    except HostError:
        status, refusal = 400, NO_NAME
    except Refusal as refused:
        status, refusal = refused.args
    if refusal:
        message, more_to_come, close = refusal, True, True
    close = close or last
    # Where the path is kept, and of long ones, hardly any is asked for twice.
    rare = rule.keep_path or len(location) + len(message) > 300
    find_response = render if rare else shared_render
    head_only = line.startswith("HEAD ")
    response, size = find_response(status, location, message, head_only, close, date)
    if refusal and text.startswith("\x16"):  # a TLS client would not understand it
        response = b""
    log = log_line(line, status, size, fields)
    return Answer(response, status, location, target, close, more_to_come, log, refusal)


def is_refused_early(partial: bytes) -> bool:
    """Return whether a head that has come only in part is already refused.

    Its client gets an error at once, instead of a closed connection at the deadline.
    """
    if partial.startswith(b"\x16") or len(partial) > MAX_HEAD:
        return True
    if partial.count(b"\n") > partial.count(b"\r\n"):  # a lone LF
        return True
    if b"\n" in partial[2:]:  # the request line has come, after the empty line that is tolerated
        return not REQUEST_LINE_BYTES.match(partial)
    return len(partial) > MAX_TARGET + 66  # a method of 50 characters, and the HTTP version


def head_end(data: bytes) -> int:
    """Return the length of the first head in these bytes, 0 while it is incomplete.

    A head that is refused already counts as whole.
    """
    end = data.find(b"\r\n\r\n")
    if end >= 0:
        return end + 4
    return len(data) if is_refused_early(data) else 0


# ---- The log -------------------------------------------------------------------------


def open_nonblocking(fd: int) -> int:
    """Return a non-blocking file descriptor of our own for the terminal behind this one.

    When a terminal has room for only a part of what is written, write() waits for the rest,
    whatever poll() said.  Making `fd` itself non-blocking would change it for the shell too.
    """
    with contextlib.suppress(OSError):
        if os.isatty(fd):
            return os.open(os.ttyname(fd), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return fd


class Log:
    """Writes lines to a file descriptor without making the server wait.

    write(line) takes a line that ends in a newline; flush() writes the lines taken so far.

    A regular file is written directly.  For a pipe, a socket or a terminal, poll() tells before
    each write whether it accepts PIPE_BUF bytes.  While it does not (a reader that stalls,
    Ctrl-S), lines wait here, and those beyond `max_waiting` bytes are lost.  A full disk or a
    closed pipe loses lines too.  tell(text) is called at the first error, and with the number of
    lost lines when writing works again, or at the end.

    Windows has no poll() for files, so a paused console makes the server wait there.
    """

    max_waiting = 1 << 20  # bytes

    def __init__(self, fd: int, tell: Callable[[str], Any]) -> None:
        self.fd, self.tell = fd, tell
        self.lines: List[str] = []  # since the last flush()
        self.waiting = b""  # what is not written yet
        self.within_line = False  # whether the last write ended within a line
        self.faulty = False  # whether the last write failed
        self.lost = 0  # lines that tell() has not reported
        self.poll: Any = None
        if hasattr(select, "poll") and not stat.S_ISREG(os.fstat(fd).st_mode):
            self.fd = open_nonblocking(fd)
            self.poll = select.poll()
            self.poll.register(self.fd, select.POLLOUT)

    def write(self, line: str) -> None:
        self.lines.append(line)

    def flush(self) -> None:
        """Write what can be written now."""
        lines, self.lines = self.lines, []
        try:
            self.waiting += "".join(lines).encode("ascii", "backslashreplace")
        except MemoryError:
            self.lost += len(lines)
        if self.waiting:
            self.write_waiting()
        if len(self.waiting) > self.max_waiting:
            end = self.waiting.rfind(b"\n", 0, self.max_waiting) + 1
            self.lost += self.waiting.count(b"\n", end)
            self.waiting = self.waiting[:end]
        if self.lost and not self.waiting and not self.faulty:
            self.tell_lost()

    def write_waiting(self) -> None:
        """Write as much of what waits as is accepted."""
        data, start = self.waiting, 0
        size = len(data) if self.poll is None else select.PIPE_BUF
        error = None
        try:
            while start < len(data) and (self.poll is None or self.poll.poll(0)):
                start += os.write(self.fd, data[start : start + size])
        except BlockingIOError:
            pass
        except OSError as caught:
            error = caught
        if start:
            self.faulty = False
            self.within_line = data[start - 1 : start] != b"\n"
            self.waiting = data[start:]
        if error:
            self.give_up(error)

    def give_up(self, error: OSError) -> None:
        """Discard what waits; leave only a newline, to end a line that was written in part."""
        if not self.faulty:
            self.tell(f"the log cannot be written; redirects go on without it: {error.strerror}")
        self.faulty = True
        # A newline at the very beginning only ends a line that is already written.
        self.lost += self.waiting.lstrip(b"\n").count(b"\n")
        self.waiting = b"\n" if self.within_line else b""

    def tell_lost(self) -> None:
        self.tell(f"{self.lost} lines of the log were lost")
        self.lost = 0

    def close(self) -> None:
        """Write what is left, but do not wait long for a reader that stalls."""
        self.flush()
        if self.waiting and self.poll is not None and self.poll.poll(500):
            self.flush()
        self.lost += self.waiting.lstrip(b"\n").count(b"\n")
        if self.lost:
            self.tell_lost()


@lru_cache(maxsize=2)
def dates(now: int) -> Tuple[str, str]:
    """Return a time as a Date field (RFC 9110 section 5.6.7) and as an access log writes it."""
    return formatdate(now, usegmt=True), time.strftime("%d/%b/%Y:%H:%M:%S %z", time.localtime(now))


def error_line(client: str, text: str) -> str:
    """Return a line of the error log, with the client's address where fail2ban looks for it."""
    return f"[{dates(int(time.time()))[1]}] owahttps: {client} {text}\n"


# ---- The listener --------------------------------------------------------------------

# Theory of operation.  One thread and one selector serve all connections.  In each turn the
# server asks which sockets are ready, and serves them in batches of 24: all receive, then all
# reply, then all send.  (One connection after the other takes twice the time for a reply: each
# system call evicts the interpreter's data from the processor's cache.)
#
# A handler is one connection, in one of four states.  Its own methods change them; the server
# sets only DONE, in drop().
#
#   READING    waits for a request, or for the rest of its head
#   WRITING    waits until the client takes more: there are bytes to send, or whole requests left
#              to answer after its max_replies of this turn
#   DRAINING   its last answer is sent, but the client may still be sending.  Closing now would
#              reset the connection, and the client would lose the answer.  Reads and discards.
#   DONE       the server closes the socket at the end of the batch
#
#   READING <-> WRITING                    while there are requests
#   READING, WRITING -> DONE               the last answer is sent, the client sends nothing more
#   READING, WRITING -> DRAINING -> DONE   the same, but the client may still be sending
#   any -> DONE                            the client has gone, or drop()
#
# receive() only fills `incoming`, reply() only moves whole requests from there to `outgoing`,
# and send() only empties `outgoing` and chooses the next state.  Each may be called in any state.
#
# Each wait has a deadline: for a whole head, however slowly it comes; from an answer to the next
# request; for the client to take its answers; for the drain.  Deadlines use time.monotonic(); the
# wall clock is used only for the Date field and the logs.
#
# The server keeps its open connections in the order of their last progress.  When there are more
# than max_connections, it closes the one that has made no progress for the longest time.  When
# they hold more than max_bytes, it closes some of those that hold bytes, in the same order.  When
# file descriptors run out, it closes one for the next client; when another resource runs out, it
# stops accepting for 10 ms.  An exception in one connection closes only that connection.
#
# A new client is served as soon as it is accepted.  Most requests are answered and closed in that
# same step, and the selector never hears of them.  TCP_DEFER_ACCEPT, where there is one, keeps a
# client that says nothing in the kernel, and saves a quarter of the time for the others.
#
# Why not asyncio or threads: they need three to six times the processor time for each request.
# Why not logging: its handlers wait for a reader that stalls.

# Linux: the last answer and the end of the connection travel in one packet.
MSG_MORE = getattr(socket, "MSG_MORE", 0)
READING, WRITING, DRAINING, DONE = "reading", "writing", "draining", "done"


def read_token(folder: str, token: str) -> Optional[bytes]:
    """Return the file of an ACME token, None where there is none; raises PermissionError.

    certbot --webroot writes FOLDER/.well-known/acme-challenge/TOKEN, acme-tiny and dehydrated
    write FOLDER/TOKEN.  It must be a regular file, not a link, and at most MAX_TOKEN_FILE long.
    """
    for path in (folder + ACME_PREFIX + token, os.path.join(folder, token)):
        # Should a link or a FIFO replace the file after lstat(), open() neither follows nor waits.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        flags |= getattr(os, "O_BINARY", 0)
        try:
            if not stat.S_ISREG(os.lstat(path).st_mode):
                continue
            with open(os.open(path, flags), "rb") as file:
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    data = file.read(MAX_TOKEN_FILE + 1)
                    return data if len(data) <= MAX_TOKEN_FILE else None
        except PermissionError:
            raise
        except OSError:
            continue
    return None


def client_host(client_address: Any) -> str:
    """Return the address of a client as the logs show it."""
    host = str(client_address[0])
    return host[7:] if host.startswith("::ffff:") else host  # IPv4 on an IPv6 socket


class RedirectHandler(BaseHTTPRequestHandler):
    """Redirects every request of one connection, by the server's rule or else by its own.

    Under a stock ThreadingHTTPServer, handle() serves the connection to its end.  A
    RedirectServer's sockets do not block: it calls receive(), reply() and send() itself.

    The server's `access_log` and `error_log`, where it has them, get lines by write(str).
    parse_request() is not used: it decodes, and treats a lone CR as the end of a line.
    send_error() and the other methods that write to `wfile` do not work here.
    """

    rule = RedirectRule()
    head_seconds = 10.0  # for a whole head; also to take answers while further requests wait
    idle_seconds = 15.0  # from an answer to the next request; also to take the answer
    drain_seconds = 5.0  # for what the client still sends after its last answer
    max_drained = 32 * 1024 * 1024  # bytes of that
    max_received = 8192  # bytes in one step
    max_replies = 2  # in one step: other connections have their turn before the next ones
    max_outgoing = 64 * 1024  # bytes; beyond that, the client has to take some first

    def setup(self) -> None:
        self.rule = getattr(self.server, "rule", None) or self.rule
        self.access_log = getattr(self.server, "access_log", None)
        self.error_log = getattr(self.server, "error_log", None)
        self.client = client_host(self.client_address)
        self.state = READING
        self.deadline = time.monotonic() + self.head_seconds
        self.incoming = b""  # not answered yet
        self.outgoing = b""  # not sent yet
        self.between_requests = False  # whether the next byte begins a new head
        self.last = getattr(self.server, "stopping", False)  # whether the next answer is the last
        self.close_connection = False  # whether the last answer has been made
        self.may_send_more = False  # whether the client may still be sending after it
        self.drained = 0  # bytes
        self.registered = 0  # the event that the server's selector waits for
        self.held = 0  # bytes in `incoming` and `outgoing` when the server last counted them

    def finish(self) -> None:
        """Leave the socket to the server, which closes it."""

    def handle(self) -> None:
        """Serve a blocking socket to its end; leave a non-blocking one to the server."""
        while self.request.gettimeout() != 0 and self.state != DONE:
            left = self.deadline - time.monotonic()
            if left <= 0:
                break
            self.request.settimeout(left)
            self.handle_one_request()

    def handle_one_request(self) -> None:
        """Take each step once; on a blocking socket, receive() and send() wait."""
        self.receive()
        self.reply()
        self.send()

    def receive(self) -> None:
        """Take what the client has sent."""
        if self.state == WRITING:
            return
        try:
            data = self.request.recv(self.max_received)
        except BlockingIOError:
            return
        except OSError:  # the client is gone, or too slow for a blocking socket
            data = b""
        if not data:
            self.state = DONE
        elif self.state == READING:
            self.incoming += data
            self.may_send_more = len(data) == self.max_received
        else:
            self.drained += len(data)
            if self.drained > self.max_drained:
                self.state = DONE

    def reply(self) -> None:
        """Answer the whole requests that have come, or some of them, into `outgoing`."""
        if self.outgoing or not self.incoming:
            return
        replies = 0
        while self.incoming and not self.close_connection and replies < self.max_replies:
            end = head_end(self.incoming)
            if not end or len(self.outgoing) > self.max_outgoing:
                break
            self.reply_to(self.incoming[:end])
            self.incoming = self.incoming[end:]
            replies += 1
        if self.outgoing or self.between_requests:
            # A new wait begins: after an answer, or with the first bytes of the next head.
            self.between_requests = not self.incoming
            seconds = self.idle_seconds if self.between_requests else self.head_seconds
            self.deadline = time.monotonic() + seconds

    def reply_to(self, head: bytes) -> Answer:
        """Answer one request, and write its lines to the logs."""
        date, log_date = dates(int(time.time()))
        result = answer(head, self.rule, date, self.find_token, self.last)
        self.outgoing += result.response
        if result.close:
            self.close_connection = True
            # At a stop, a kept connection may be sending its next request.
            if result.more_to_come or self.last:
                self.may_send_more = True
        if self.access_log is not None and result.response:  # TLS is only in the error log
            self.access_log.write(f"{self.client} - - [{log_date}] {result.log}\n")
        if result.refusal:
            self.log_error("refused: %s", result.refusal)
        return result

    def send(self) -> None:
        """Send what there is to send, and choose the next state."""
        if self.outgoing:
            try:
                flags = MSG_MORE if self.close_connection else 0
                self.outgoing = self.outgoing[self.request.send(self.outgoing, flags) :]
            except BlockingIOError:
                pass
            except OSError:
                self.state = DONE
                return
        elif not self.close_connection:
            return  # there is nothing new to send
        if self.state in (DRAINING, DONE):
            return
        if self.outgoing:
            self.state = WRITING
        elif self.close_connection:
            self.close_or_drain()
        else:
            more = bool(self.incoming) and head_end(self.incoming) > 0
            self.state = WRITING if more else READING

    def close_or_drain(self) -> None:
        """End after the last answer; first drain where the client may still be sending."""
        self.state = DONE
        if not (self.may_send_more or self.incoming):
            return
        self.incoming = b""
        try:
            self.request.shutdown(socket.SHUT_WR)
        except OSError:  # the client has gone
            return
        self.state = DRAINING
        self.deadline = time.monotonic() + self.drain_seconds

    def find_token(self, token: str) -> Optional[bytes]:
        """Return the file of an ACME token, None where there is none."""
        try:
            return read_token(self.rule.acme_dir, token)
        except PermissionError:
            self.log_error("error: the file of an ACME token cannot be read by this user")
            return None

    def log_error(self, format: str, *args: Any) -> None:
        """Write a line to the server's error log."""
        if self.error_log is not None:
            self.error_log.write(error_line(self.client, format % args))


class AnyFamilyServer(HTTPServer):
    """An HTTPServer for IPv4 and IPv6; host "" is every address, in one socket where possible."""

    # On Windows, SO_REUSEADDR would let a second server take the port of the first one.
    allow_reuse_address = sys.platform != "win32"

    def __init__(
        self, server_address: Address, handler: Any, bind_and_activate: bool = True
    ) -> None:
        host, port = server_address
        if host == "" and socket.has_ipv6:
            try:
                self.address_family = socket.AF_INET6
                super().__init__(("::", port), handler, bind_and_activate)
                return
            except OSError as error:
                no_ipv6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT)
                if error.errno not in no_ipv6:
                    raise
        info = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0]
        self.address_family = info[0]
        super().__init__(info[4], handler, bind_and_activate)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            level = getattr(socket, "IPPROTO_IPV6", 41)  # Windows lacks the name before 3.8
            self.socket.setsockopt(level, socket.IPV6_V6ONLY, self.server_address[0] != "::")
        if sys.platform == "win32":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        # Accepted sockets inherit it.  Without it, Nagle's algorithm and delayed acknowledgement
        # make answers to pipelined requests wait 40 ms.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Not HTTPServer's: it asks the DNS for a name, which can take seconds.
        TCPServer.server_bind(self)
        self.server_name = str(self.server_address[0])
        self.server_port = int(self.server_address[1])


NO_DESCRIPTORS = (errno.EMFILE, getattr(errno, "WSAEMFILE", errno.EMFILE))
NO_RESOURCES = (errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class RedirectServer(AnyFamilyServer):
    """An HTTPServer for RedirectHandlers, which serves all connections from one thread.

    server_address   (host, port); host "" is every address, port 0 is a free one; the real
                     address is in the attribute of the same name
    rule             a RedirectRule (default: that of the handler)
    max_connections  open at the same time; beyond it, old ones are closed for new ones
    access_log, error_log   None, or anything with write(str) and flush(): flush() is called
                     after each turn

    serve_forever(), shutdown(), server_close(), handle_error(), verify_request() and `with` are
    those of socketserver; serve_forever() closes the listening socket when it ends, so it runs
    once.  stop() is shutdown() that does not wait, for a signal handler.  handle_request() does
    not work here.
    """

    request_queue_size = 4096  # what Linux allows by default (net.core.somaxconn)
    grace_seconds = 2.0  # after a stop, for requests that are under way
    late_seconds = 0.2  # after a stop, for what clients sent before it
    sweep_seconds = 0.25  # from one look for overdue connections to the next
    max_batch = 24  # connections that take each step together
    max_writers = 96  # connections served in one turn that wait to send
    max_overdue = 64  # connections closed in one turn because they are overdue
    max_bytes = 16 * 1024 * 1024  # of requests that are not answered and answers not sent, in all
    rule: Optional[RedirectRule] = None

    def __init__(
        self,
        server_address: Address,
        RequestHandlerClass: Type[RedirectHandler] = RedirectHandler,
        bind_and_activate: bool = True,
        *,
        rule: Optional[RedirectRule] = None,
        max_connections: int = 450,
        access_log: Optional[Any] = None,
        error_log: Optional[Any] = None,
    ) -> None:
        if rule is not None:
            self.rule = rule
        self.max_connections = max_connections
        self.access_log, self.error_log = access_log, error_log
        # The open connections, each with its deadline at its last progress; the one without
        # progress for the longest time is first.
        self.connections: "OrderedDict[RedirectHandler, float]" = OrderedDict()
        self.held_bytes = 0  # by all of them
        self.accepted: List[RedirectHandler] = []  # in this batch
        self.next_sweep = 0.0
        self.stopping = False
        self.stopped = threading.Event()
        self.stopped.set()
        super().__init__(server_address, RequestHandlerClass, bind_and_activate)

    def server_bind(self) -> None:
        if hasattr(socket, "TCP_DEFER_ACCEPT"):
            seconds = int(self.RequestHandlerClass.head_seconds)  # type: ignore[attr-defined]
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, max(1, seconds))
        super().server_bind()

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until shutdown() or stop(), and then finish the requests in progress."""
        self.stopped.clear()
        self.selector = selectors.DefaultSelector()
        try:
            self.socket.setblocking(False)
            self.selector.register(self.socket, selectors.EVENT_READ)
            while not self.stopping:
                self.turn(poll_interval)
            self.wind_up()
        finally:
            for handler in list(self.connections):
                self.drop(handler)
            self.flush_logs()
            self.selector.close()
            self.stopped.set()

    def stop(self) -> None:
        """Ask serve_forever() to end, without waiting for it."""
        self.stopping = True

    def shutdown(self) -> None:
        self.stop()
        self.stopped.wait()

    def wind_up(self) -> None:
        """Accept the clients that have come, then no more, and let requests under way end."""
        # At most a full queue: under a flood there is always one more.
        for _ in range(self.request_queue_size // self.max_batch):
            if not self.accept():
                break
        self.selector.unregister(self.socket)
        self.socket.close()
        for handler in self.connections:
            handler.last = True
        start = time.monotonic()
        while self.connections and time.monotonic() < start + self.grace_seconds:
            self.turn(0.02)
            busy = any(
                one.incoming or one.outgoing or one.state == DRAINING for one in self.connections
            )
            if not busy and time.monotonic() > start + self.late_seconds:
                break

    def turn(self, timeout: float) -> None:
        """Wait for events, at most this many seconds, and serve them."""
        # Taken before the wait: after the machine was suspended, what has arrived is read before
        # anything counts as overdue.
        now = time.monotonic()
        try:
            events = self.selector.select(max(0, min(timeout, self.next_sweep - now)))
            # The listening socket has no handler.
            ready = [key.data for key, _ in events if key.data]
            if len(ready) < len(events):
                self.accept()
            for number, handlers in enumerate(self.batches(ready, now)):
                if number and not self.stopping:  # after a stop, its socket is closed
                    self.accept()  # new clients do not wait for a crowd of others
                self.serve(handlers)
            if now >= self.next_sweep:
                self.sweep(now)
            self.service_actions()
            self.flush_logs()  # what sweep() told, and what still waits
        except Exception:  # such as ENOMEM of the selector; no client is to blame
            self.handle_error(None, ("-", 0))
            # Windows' select() fails for all where one handler has closed its socket itself.
            for handler in [one for one in self.connections if one.request.fileno() < 0]:
                self.drop(handler)
            time.sleep(0.01)

    def batches(self, ready: List[RedirectHandler], now: float) -> Iterator[List[RedirectHandler]]:
        """Divide the handlers that are ready into those that take their steps together.

        The socket of a client that sends hundreds of requests at once is writable nearly all the
        time.  Only some of those connections are served in a turn: the ones whose deadlines are
        earliest.
        """
        chosen = [handler for handler in ready if handler.state != WRITING]
        if len(chosen) < len(ready):
            writers = [handler for handler in ready if handler.state == WRITING]
            writers.sort(key=lambda handler: handler.deadline)
            chosen += writers[: self.max_writers]
            for handler in writers[self.max_writers :]:  # they wait for us, and are not overdue
                handler.deadline = max(handler.deadline, now + self.sweep_seconds)
        for start in range(0, len(chosen), self.max_batch):
            yield chosen[start : start + self.max_batch]

    def sweep(self, now: float) -> None:
        """Drop overdue connections, a few at a time, so that others do not wait for a crowd."""
        overdue = [handler for handler in self.connections if handler.deadline < now]
        self.next_sweep = now if len(overdue) > self.max_overdue else now + self.sweep_seconds
        for handler in overdue[: self.max_overdue]:
            if handler.state == READING and handler.incoming.strip():  # an empty line is nothing
                handler.log_error("refused: no whole request head in time")
            self.drop(handler)

    def flush_logs(self) -> None:
        for log in (self.access_log, self.error_log):
            if log is not None:
                try:
                    log.flush()
                except Exception:  # a log of the caller's own
                    self.handle_error(None, ("-", 0))

    def accept(self) -> bool:
        """Accept a few clients and serve them; return whether there may be more."""
        self.accepted, more = [], True
        for _ in range(self.max_batch):
            try:
                request, client_address = self.get_request()
            except BlockingIOError:
                more = False
                break
            except OSError as error:
                if error.errno in NO_DESCRIPTORS + NO_RESOURCES:
                    self.make_room(error.errno)
                    more = False
                    break
                continue  # that client has gone already
            try:
                if self.verify_request(request, client_address):
                    self.process_request(request, client_address)
                else:
                    self.close_request(request)
            except Exception:
                self.handle_error(request, client_address)
                self.close_request(request)
        if more and not self.accepted:
            time.sleep(0.01)  # nothing came of any try: the loop would spin
        self.serve(self.accepted)
        return more

    def make_room(self, error_number: Optional[int]) -> None:
        """Close a connection for the next client, or pause, after accept() failed with this."""
        if self.accepted:
            return  # most of these end at once, and give their descriptors back
        if error_number in NO_DESCRIPTORS and self.connections:
            self.drop(next(iter(self.connections)))
        else:
            time.sleep(0.01)  # or the loop would spin

    def process_request(self, request: Any, client_address: Any) -> None:
        """Make the handler of a client that has been accepted."""
        request.setblocking(False)
        # The constructor calls setup(), and handle(), which leaves a non-blocking socket alone.
        handler: Any = self.RequestHandlerClass(request, client_address, self)  # type: ignore
        self.accepted.append(handler)

    def serve(self, handlers: List[RedirectHandler]) -> None:
        """Take each step with all of these; an exception costs its own connection."""
        while True:
            try:
                for handler in handlers:
                    handler.receive()
                for handler in handlers:
                    handler.reply()
                for handler in handlers:
                    handler.send()
                for handler in handlers:
                    self.settle(handler)
                break
            except Exception:
                # handler is the one that failed.  The steps begin again for the others, which
                # does no harm: receive() finds nothing new, reply() and send() nothing to do.
                self.handle_error(handler.request, handler.client_address)
                self.drop(handler)
                handlers.remove(handler)
        self.flush_logs()  # after each batch: a pipe cannot take all lines of a flood at once

    def settle(self, handler: RedirectHandler) -> None:
        """Close a connection that is done; for any other, update the server's accounts."""
        if handler.state == DONE:
            self.drop(handler)
            return
        event = selectors.EVENT_WRITE if handler.state == WRITING else selectors.EVENT_READ
        if handler.registered != event:
            if handler.registered:
                self.selector.modify(handler.request, event, handler)
            else:
                self.selector.register(handler.request, event, handler)
            handler.registered = event
        # A new deadline means progress: this connection is the last to be closed for another.
        if self.connections.get(handler) != handler.deadline:
            self.connections[handler] = handler.deadline
            self.connections.move_to_end(handler)
            if len(self.connections) > self.max_connections:
                self.drop(next(iter(self.connections)))
        size = len(handler.incoming) + len(handler.outgoing)
        if size != handler.held:
            self.held_bytes += size - handler.held
            handler.held = size
            if self.held_bytes > self.max_bytes:
                self.free_bytes()

    def free_bytes(self) -> None:
        """Close connections that hold bytes, until a quarter of the budget is free again."""
        for handler in list(self.connections):
            if self.held_bytes <= self.max_bytes * 3 // 4:
                break
            if handler.held:
                self.drop(handler)

    def drop(self, handler: RedirectHandler) -> None:
        """Close a connection; its bytes are free at once.  Dropping one twice does no harm."""
        handler.state, handler.incoming, handler.outgoing = DONE, b"", b""
        if handler.registered:
            handler.registered = 0
            self.connections.pop(handler, None)
            self.held_bytes -= handler.held
            handler.held = 0
            with contextlib.suppress(KeyError, ValueError):  # a handler has closed it itself
                self.selector.unregister(handler.request)
        try:
            if handler.request.fileno() >= 0:
                self.close_request(handler.request)
        except Exception:
            self.handle_error(handler.request, handler.client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Write one line about the exception under way; only that connection ends."""
        text = log_escape(repr(sys.exc_info()[1]))
        with contextlib.suppress(Exception):  # a log that fails does not end the server
            log = sys.stderr if self.error_log is None else self.error_log
            log.write(error_line(client_host(client_address), f"error: {text}"))


# ---- The article --------------------------------------------------------------------

# Microsoft's article Q279681: one ASP page and 18 steps.  The page is the article's, to the
# letter.  The steps are told in our own words, with IIS's labels as the article gives them.


class Part(NamedTuple):
    """A part of a recipe: its name, its text, and its file name ("": it is not a file)."""

    name: str
    text: str
    file: str = ""


ASP_PAGE = """\
<%
      If Request.ServerVariables("SERVER_PORT")={port} Then
         Dim strSecureURL
         strSecureURL = "https://"
         strSecureURL = strSecureURL & {name}
         strSecureURL = strSecureURL & "{rest}"
         Response.Redirect strSecureURL
      End If
   %>
"""

ARTICLE_STEPS = """\
 1. Save the page as Owahttps.asp in the folder Inetpub\\Wwwroot\\Owaasp (make the folder).
    Copy it as it is: IIS fills in {variables}.
 2. Open Internet Service Manager.
 3. Expand (double-click) the name of the computer.
 4. Expand Default Web Site.
 5. Right-click the {folder} folder and click Properties.
 6. Click the Custom Errors tab.
 7. Double-click the 403.4 error code (listed as 403;4). Note what it is set to.
 8. In the Message Type list, select URL.
 9. In the URL field, type /owaasp/owahttps.asp
10. Click OK.
11. Click the Directory Security tab.
12. Under Secure Communications, click Edit.
13. Select the Require secure channel (SSL) check box. Select Require 128-bit encryption too, if
    clients must have it. Only the {folder} folder needs this for OWA. The Owaasp folder must stay
    without it, wherever else you set it: the page is asked for over plain HTTP.
14. Click OK.
15. Click OK.
16. At a command prompt, type: net stop iisadmin /y   (or restart the server)
    Note which services it stops.{services}
17. Start every service that was stopped.
18. Test: {http} must land on {https}
"""
# Q279681 is for IIS 5.0.  What IIS 6.0 needs besides is from KB 842429.
IIS_6_STEPS = """\
    On IIS 6.0 (labels not verified) the site is below Web Sites. Before step 18, allow Active
    Server Pages under Web Service Extensions, and make Owaasp an application in the application
    pool of the {folder} folder; otherwise IIS answers 403.18 (KB 842429).
"""

ARTICLE_UNDO = """\
Do steps 2 to 6 again, double-click 403.4, and set it to what you noted (Message Type: Default, if
it was not set). Clear what you selected in step 13. Do steps 16 and 17. Delete the folder Owaasp.
"""


def asp_page(rule: RedirectRule, port: int = 80) -> str:
    """Return the article's Owahttps.asp for this rule; for the default rule, to the letter.

    Raises RuleError where the page cannot express the rule.
    """
    if rule.keep_path:
        raise RuleError("the ASP page cannot do --keep-path: IIS hands it a decoded URL")
    if rule.status != 302:
        raise RuleError(
            f"the ASP page cannot do --status {rule.status}: Response.Redirect sends 302"
        )
    if rule.allow_hosts:
        raise RuleError("the ASP page cannot do --allow-host: it has no list of names; see --host")
    if rule.health or rule.acme_dir or rule.api:
        raise RuleError(
            "the ASP page cannot do --health, --acme-dir or --api: it is for one folder"
        )
    name = f'"{rule.host}"' if rule.host else 'Request.ServerVariables("SERVER_NAME")'
    rest = with_port("", rule.https_port, 443) + rule.path
    return ASP_PAGE.format(port=port, name=name, rest=rest)


def article_steps(recipe: str, rule: RedirectRule, port: int) -> str:
    """Return the 18 steps for Exchange 2000 or 2003."""
    folder = rule.path.split("/")[1]
    if not folder:
        raise RuleError("the article is for one folder, such as --path /exchange, not for /")
    if recipe == "exchange2003":
        text, services = ARTICLE_STEPS + IIS_6_STEPS, ""
    else:
        text, services = ARTICLE_STEPS, " With Exchange 2000, all its services stop with IIS."
    return text.format(
        variables="SERVER_PORT" if rule.host else "SERVER_PORT and SERVER_NAME",
        folder="Exchange" if folder == "exchange" else folder,
        services=services,
        http=f"http://{with_port(rule.host or 'HOST', port, 80)}{rule.path}",
        https=rule.location("SERVER_NAME", "/"),
    )


def article_notes(recipe: str, rule: RedirectRule, port: int) -> str:
    """Return what the article does not say."""
    notes = f"""\
 - The site needs a certificate, ports {port} and {rule.https_port}, and no host headers (Q239875).
 - On any port but {port} the page does nothing: an empty answer with status 200.
"""
    if not rule.host:
        notes += """\
 - SERVER_NAME is what the user typed. A certificate may not name it: see --host.
"""
    notes += f"""\
 - Deep links are lost: everyone lands on {rule.path}. A posted form was sent in the clear.
 - http://{rule.host or "HOST"}/ itself is not redirected: Q319878 does that.
 - Not behind a load balancer that terminates TLS: the redirect would loop. Redirect there.
 - Exchange copies settings from Active Directory (KB 294280): test again after 15 minutes.
"""
    if recipe == "exchange2003":
        notes += """\
 - On a single server, step 13 breaks ActiveSync and OMA: read KB 817379 first.
 - Forms-based authentication has a redirect of its own: not verified with this one.
"""
    return notes


def check_command(rule: RedirectRule, port: int) -> str:
    """Return the command that verifies a recipe, for each name of the rule, or for HOST."""
    names = sorted(rule.allow_hosts) or [rule.host or "HOST"]
    sites = " ".join(with_port(name, port, 80) for name in names)
    expected = rule._replace(allow_hosts=frozenset(), health="", acme_dir="", api=())
    if len(names) == 1:
        expected = expected._replace(host="")
    return f"python3 owahttps.py check {sites}{command_options(expected)}"


def article_recipe(recipe: str, rule: RedirectRule, port: int) -> List[Part]:
    """Return the parts of the article's recipe, for Exchange 2000 on IIS 5.0 or 2003 on IIS 6.0."""
    more = ", ActiveSync, OMA" if recipe == "exchange2003" else ""
    verify = f"""\
From another machine: {check_command(rule, port)}
{rule.path} must be right there. / is critical: the article does not redirect it.
Over HTTPS, as before: OWA, Public, Exchange System Manager{more}.
"""
    return [
        Part("asp", asp_page(rule, port), "Owahttps.asp"),
        Part("steps", article_steps(recipe, rule, port)),
        Part("notes", article_notes(recipe, rule, port)),
        Part("undo", ARTICLE_UNDO),
        Part("verify", verify),
    ]


# ---- The stub ------------------------------------------------------------------------

# Only for loopback addresses: anyone can read this key.  The certificate is not a CA: trusting it
# means trusting it for localhost only.  It was made by:
#   openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout - \
#     -subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1 \
#     -not_before 20000101000000Z -not_after 99991231235959Z \
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
  body {{ font: 1.05rem/1.5 system-ui, sans-serif; }}
  body {{ max-width: 40rem; margin: 3rem auto; padding: 0 1.2rem; }}
  h1 {{ font-size: 1.5rem; color: var(--{mood}); text-wrap: balance; }}
  li {{ margin: 1rem 0; padding: .8rem 1rem; border: 1px solid var(--line); border-radius: .5rem; }}
  ol {{ padding: 0; list-style: decimal inside; }}
  code {{ display: block; margin-top: .3rem; font-size: .95rem; }}
  code {{ overflow-wrap: anywhere; white-space: pre-wrap; }}
</style>
<h1>{title}</h1>
<ol>
{steps}</ol>
</html>
"""


Story = List[Tuple[str, str]]  # what happened: sentences, each with its detail


class StubHandler(BaseHTTPRequestHandler):
    """Stands for Outlook Web Access: a page that tells how the browser came here."""

    server_version, sys_version = "owahttps-stub", ""
    timeout = 10
    status, title = 200, "You are on HTTPS"

    def story(self) -> Story:
        """Return what happened to this browser."""
        told = self.server.story(self.headers.get("Host", ""))  # type: ignore[attr-defined]
        sock: Any = self.connection
        version, cipher = sock.version(), sock.cipher()[0]
        return [*told, ("This page came over a secure channel.", f"{version}, {cipher}")]

    # There is no Strict-Transport-Security here: a browser that trusts the certificate could then
    # no longer open the demo's plain HTTP.
    def do_GET(self) -> None:
        steps = ""
        for sentence, detail in self.story():
            steps += f"<li>{escape(sentence)}<code>{escape(detail)}</code>\n"
        mood = "good" if self.status == 200 else "bad"
        body = STUB_PAGE.format(title=self.title, mood=mood, steps=steps).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_request(self, code: Any = "-", size: Any = "-") -> None:  # noqa: ARG002
        tell = getattr(self.server, "tell", None)
        if tell:
            tell(f"{log_escape(self.command)} {log_escape(self.path)}  {int(code)} {self.title}")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of a request that cannot be read."""


class ThreadingServer(ThreadingMixIn, AnyFamilyServer):
    """A thread for each connection, because browsers open some that they do not use."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a browser that does not trust the certificate breaks off to ask its user."""


def pem_trouble(error: OSError) -> str:
    """Return what is wrong with a file of certificates or keys, without OpenSSL's own words."""
    if isinstance(error, ssl.SSLError):
        return "not a PEM certificate with its key"
    return error.strerror or str(error)


class StubServer(ThreadingServer):
    """An HTTPS server with this certificate and key, or with the embedded ones on loopback.

    story(host) returns what happened before, for the page at this Host; tell(line) hears of each
    request.  Raises RuleError for a certificate that cannot be used.
    """

    def __init__(
        self,
        server_address: Address,
        certificate: str = "",
        key: str = "",
        story: Callable[[str], Story] = lambda _: [],
        tell: Optional[Callable[[str], Any]] = None,
    ) -> None:
        self.story, self.tell = story, tell
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if certificate:
            try:
                self.context.load_cert_chain(certificate, key or None)
            except OSError as error:
                given = f"--cert {certificate!a}" + (f", --key {key!a}" if key else "")
                raise RuleError(f"{given}: {pem_trouble(error)}") from None
        else:
            self.use_embedded_certificate(server_address[0])
        super().__init__(server_address, StubHandler)

    def use_embedded_certificate(self, host: str) -> None:
        if host != "localhost" and not (is_address(host) and ip_address(host).is_loopback):
            raise RuleError(f"{host!a} is not a loopback address: everybody has the embedded key")
        with tempfile.TemporaryDirectory() as folder:  # ssl takes a key only from a file
            name = os.path.join(folder, "stub.pem")
            with open(name, "w") as file:
                file.write(STUB_KEY + STUB_CERTIFICATE)
            self.context.load_cert_chain(name)

    def get_request(self) -> Tuple[Any, Any]:
        request, client_address = super().get_request()
        # The handshake is left to the handler's thread.
        secure = self.context.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        return secure, client_address


@contextlib.contextmanager
def running(server: HTTPServer) -> Iterator[Address]:
    """Serve from a thread; the context's value is the server's address."""
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    thread.start()
    try:
        yield server.server_address[:2]  # type: ignore[misc]
    finally:
        server.shutdown()
        thread.join()  # serve_forever() may not even have begun
        server.server_close()


# ---- The self-test -------------------------------------------------------------------

# Not http.client: it treats a line with a blank before its colon as the end of the head, skips
# interim answers, and has no single deadline for a whole answer.  This reads as browsers do, and
# leaves over what does not belong to an answer.  The check of part two uses it as well.

# As lenient as browsers are: letters in any case, empty lines before it, any version, more blanks
# than one, and none after the status.
STATUS_LINE = re.compile(rb"(?i)[\r\n]{0,4}HTTP/[0-9.]+ +([1-9][0-9][0-9])(?: [^\n]*)?\r?\n")
END_OF_HEAD = re.compile(rb"\n\r?\n")
CHUNK_LINE = re.compile(rb"\s*([0-9A-Fa-f]{1,8})[ \t\r]*(?:;[^\n]*)?\n")


class Response(NamedTuple):
    """One response of a server."""

    status: int
    fields: List[Tuple[str, str]]  # names in lower case, values without the blanks around them
    body: bytes
    complete: bool  # whether the body is known to be whole; not if only a close ends it

    def values(self, name: str) -> List[str]:
        return [value for key, value in self.fields if key == name]

    def field(self, name: str) -> Optional[str]:
        """Return the first value of a field, None where there is none."""
        return next(iter(self.values(name)), None)


def read_field_lines(lines: List[str]) -> List[Tuple[str, str]]:
    """Take field lines apart; a fold is replaced with a blank (RFC 9112 section 5.2)."""
    fields: List[Tuple[str, List[str]]] = []
    for line in lines:
        name, colon, value = line.partition(":")
        if line[:1] in ("\t", " ") and fields:
            fields[-1][1].append(line.strip())
        elif colon:
            fields.append((name.strip("\t ").lower(), [value.strip("\t\r ")]))
    return [(name, " ".join(filter(None, parts))) for name, parts in fields]


def read_chunks(data: bytes) -> Tuple[bytes, bytes, bool]:
    """Return a chunked body (RFC 9112 section 7.1), what follows it, and whether it is complete."""
    pieces: List[bytes] = []
    at = 0
    line = CHUNK_LINE.match(data)
    while line:
        size, start = int(line.group(1), 16), line.end()
        if size == 0:  # trailer fields may follow, which are skipped
            _, end, rest = data[start - 1 :].partition(b"\n\r\n")
            return b"".join(pieces), rest, bool(end)
        pieces.append(data[start : start + size])
        at = start + size
        line = CHUNK_LINE.match(data, at)
    rest = data[at:].lstrip(b"\r\n")
    return b"".join(pieces), rest if b"\n" in rest else b"", False


def read_response(data: bytes, head_only: bool = False) -> Tuple[Optional[Response], bytes]:
    """Return the first response in these bytes, and what follows it; None without a whole head.

    An interim response (1xx) is one too.  head_only: it answers a HEAD request.
    """
    start = STATUS_LINE.match(data)
    end = END_OF_HEAD.search(data, start.end() - 1) if start else None
    if not start or not end or b"\0" in data[: end.start()]:  # browsers refuse a NUL
        return None, data
    status = int(start.group(1))
    head, rest = data[start.end() : end.start()], data[end.end() :]
    fields = read_field_lines(head.decode("latin-1").split("\n"))
    empty = Response(status, fields, b"", True)
    if head_only or status < 200 or status in (204, 304):
        return empty, rest
    if "chunked" in (empty.field("transfer-encoding") or "").lower():
        body, rest, complete = read_chunks(rest)
        return Response(status, fields, body, complete), rest
    length = empty.field("content-length") or ""
    if re.fullmatch("[0-9]{1,9}", length):
        size = int(length)
        return Response(status, fields, rest[:size], len(rest) >= size), rest[size:]
    return Response(status, fields, rest, False), b""


def converse(
    sock: Any,
    request: bytes,
    deadline: float,
    enough: Callable[[bytes], bool] = lambda _: False,
    most: int = 64 * 1024,
) -> Tuple[bytes, Optional[OSError]]:
    """Send a request, and receive until enough(data), until the other side closes, or the deadline.

    deadline is a value of time.monotonic().  Receives no more after `most` bytes.  Returns what
    came, and the error that ended it, such as socket.timeout at the deadline.
    """
    data = b""
    try:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        sock.sendall(request)
        while len(data) < most and not enough(data):
            left = deadline - time.monotonic()
            if left <= 0:
                raise socket.timeout("timed out")
            sock.settimeout(left)
            piece = sock.recv(16 * 1024)
            if not piece:
                break
            data += piece
    except OSError as error:
        return data, error
    return data, None


# ---- The self-test: its cases --------------------------------------------------------

# A case is one request, sent byte for byte, and the right answers to it.  Its level says what a
# failure means, so that a server is not blamed for deciding otherwise than we do:
#
#   safe   an attack works: a Location leads to the attacker's host, or a byte of the request has
#          begun a field of the answer
#   must   a MUST of an RFC is broken; the case names the section
#   own    the server decides otherwise than we do, where the RFCs leave the choice
#
# The attacker's host is evil.example.  No request names it in a valid way, so an answer that leads
# there is unsafe, whatever its case is about.
#
# Cases that differ only in data are rows of a table, and the function's last lines make them cases.
SAFE, MUST, OWN = "safe", "must", "own"
MAIL = "mail.example.com"
EVIL = "evil.example"
GET = "GET / HTTP/1.1"
# What a MUST asks for can be less than one particular answer.
REFUSED = "a refusal"  # an error without a Location, or a connection that is closed
ACCEPTED = "an error other than 400"  # which understands the request, and says no
CLOSED = "closed"  # without an answer
ONCE = "one answer"  # a final one, and nothing after it
A_URI = "a Location that is a URI, or none"
TO = "a redirect to "  # this name, whatever its status and path


class Case(NamedTuple):
    """A request, and the answers to it that are right."""

    level: str
    id: str
    reference: str  # the RFC's section, the advisory, or what else the case comes from
    what: str
    request: bytes
    right: Tuple[str, ...] = ()  # if empty, every answer that is not unsafe
    field: str = ""  # a field of the answer ...
    value: Optional[str] = None  # ... and what it must say; None: it must not be there


def head_of(line: str, *fields: str, host: str = MAIL, connection: str = "close") -> bytes:
    """Return the head of a request with this request line."""
    lines = [line, f"Host: {host}", *fields, f"Connection: {connection}", "\r\n"]
    return "\r\n".join(lines).encode("latin-1")


def case(level: str, id: str, reference: str, what: str, request: bytes, *right: str) -> Case:
    """Make a case; if no right answer is given, every answer that is not unsafe passes."""
    return Case(level, id, reference, what, request, right)


def line_case(level: str, id: str, reference: str, line: str, *right: str) -> Case:
    """Make a case about a request line."""
    return case(level, id, reference, line, head_of(line), *right)


def get_case(level: str, id: str, reference: str, target: str, *right: str) -> Case:
    """Make a case about the request target of a GET."""
    return case(level, id, reference, f"GET {target}", head_of(f"GET {target} HTTP/1.1"), *right)


def field_case(level: str, id: str, reference: str, field: str, *right: str) -> Case:
    """Make a case about one field of the request."""
    return case(level, id, reference, field, head_of(GET, field), *right)


def host_case(level: str, id: str, reference: str, host: str, *right: str) -> Case:
    """Make a case about the value of the Host field."""
    return case(level, id, reference, f"Host: {host}", head_of(GET, host=host), *right)


def redirect_by(rule: RedirectRule, name: str = MAIL, path: str = "/", kept: bool = False) -> str:
    """Return the right answer to a request for this name and path, as describe() writes it.

    It is put together here, and not by the rule, which is under test.  `kept` says that every
    rule keeps this path.
    """
    if rule.allow_hosts and name not in rule.allow_hosts:
        return "421"
    port = "" if rule.https_port == 443 else f":{rule.https_port}"
    if not (rule.keep_path or kept):
        path = rule.path
    return f"{rule.status} https://{rule.host or name}{port}{path}"


def method_cases(rule: RedirectRule) -> List[Case]:
    """Return the cases about methods, and about what else is in an answer."""
    home = redirect_by(rule)
    redirected = [
        ("get", "RFC 6797 7.2", GET),
        ("head", "RFC 9110 9.3.2", "HEAD / HTTP/1.1"),
        ("post", "RFC 9110 9.3.3", "POST / HTTP/1.1"),
        ("propfind", "RFC 4918 9.1", "PROPFIND / HTTP/1.1"),
        ("unknown-method", "RFC 9110 9.1", "OWA-2000 / HTTP/1.1"),
        ("lower-case-method", "RFC 9110 9.1", "get / HTTP/1.1"),
        ("http10", "RFC 9110 2.5", "GET / HTTP/1.0"),
        ("http12", "RFC 9110 2.5", "GET / HTTP/1.2"),
    ]
    port_443 = "CONNECT mail.example.com:443 HTTP/1.1"
    no_port = "CONNECT mail.example.com: HTTP/1.1"
    expect = ("Expect: 100-continue", "Content-Length: 9")
    put = head_of("PUT / HTTP/1.1", *expect)
    put_10 = head_of("PUT / HTTP/1.0", *expect) + b"123456789"
    what = "no 100 that invites the body, which is in the clear"
    hsts = case(MUST, "hsts-in-clear", "RFC 6797 7.2", "no HSTS in the clear", head_of(GET))
    # Browsers keep a permanent redirect that is wrong, until its lifetime ends.
    day = case(OWN, "permanent-for-a-day", "browsers", "a lifetime of a day", head_of(GET), home)
    lifetime = "max-age=86400" if rule.status in PERMANENT else None
    return [
        *(line_case(OWN, *row, home) for row in redirected),
        line_case(MUST, "head-without-body", "RFC 9110 9.3.2", "HEAD / HTTP/1.1", ONCE, REFUSED),
        line_case(OWN, "trace", "RFC 9110 9.3.8", "TRACE / HTTP/1.1", "405"),
        line_case(OWN, "connect", "RFC 9110 9.3.6", port_443, "405", "400"),
        line_case(MUST, "connect-without-port", "RFC 9110 9.3.6", no_port, REFUSED),
        line_case(OWN, "options-asterisk", "RFC 9110 9.3.7", "OPTIONS * HTTP/1.1", "204"),
        case(OWN, "expect-continue", "RFC 9110 10.1.1", what, put, home),
        case(MUST, "expect-continue-http10", "RFC 9110 15.2", "no 1xx", put_10, ONCE, REFUSED),
        hsts._replace(field="strict-transport-security"),
        day._replace(field="cache-control", value=lifetime),
    ]


def host_cases(rule: RedirectRule) -> List[Case]:
    """Return the cases about Host fields that are in the grammar."""
    names = [
        ("host-port", "RFC 9110 7.2", "mail.example.com:8080", MAIL),
        ("host-empty-port", "RFC 3986 3.2.3", "mail.example.com:", MAIL),
        ("host-capitals", "RFC 3986 6.2.2.1", "MAIL.Example.COM", MAIL),
        ("host-trailing-dot", "RFC 1034 3.1", "mail.example.com.", MAIL),
        ("host-blanks", "RFC 9110 5.5", "\t mail.example.com\t ", MAIL),
        ("host-ipv4", "RFC 3986 3.2.2", "192.0.2.7:8080", "192.0.2.7"),
        ("host-ipv6", "RFC 3986 3.2.2", "[2001:DB8::1]:8080", "[2001:db8::1]"),
        ("host-punycode", "RFC 5890 2.3.2.1", "xn--bcher-kva.example", "xn--bcher-kva.example"),
    ]
    # These are not server names, and so not allowed names either.
    no_names = [
        ("host-empty", "RFC 9112 3.3", ""),
        ("host-two-dots", "RFC 1034 3.1", "mail.example.com.."),
        ("host-leading-dot", "RFC 1034 3.1", ".mail.example.com"),
        ("host-leading-hyphen", "RFC 1123 2.1", "-mail.example.com"),
        ("host-leading-underscore", "RFC 1123 2.1", "_mail.example.com"),
        ("host-comma", "RFC 1123 2.1", "mail.example.com,other.example"),
        ("host-apostrophe", "RFC 1123 2.1", "mail.example.com'"),
        ("host-encoded-letter", "RFC 1123 2.1", "m%61il.example.com"),
        ("host-ipv6-zone", "RFC 9844", "[fe80::1%25eth0]"),
        ("host-last-label-number", "WHATWG URL 3.5", "mail.256"),
        ("host-label-of-64", "RFC 1035 2.3.4", "a" * 64 + ".example"),
        ("host-of-254", "RFC 1035 2.3.4", "a." * 126 + "ab"),
        ("host-port-0", "RFC 6335 6", "mail.example.com:0"),
        ("host-port-65536", "RFC 6335 6", "mail.example.com:65536"),
    ]
    no = ("400", "421") if rule.allow_hosts else ("400",)
    table = [host_case(OWN, *row, *no) for row in no_names]
    for id, reference, host, name in names:
        table.append(host_case(OWN, id, reference, host, redirect_by(rule, name)))
    in_capitals = head_of(GET).replace(b"Host", b"HOST")
    right = redirect_by(rule)
    table.append(case(OWN, "host-in-any-case", "RFC 9110 5.1", "HOST", in_capitals, right))
    return table


def invalid_host_cases() -> List[Case]:
    """Return the cases about Host fields that are not in the grammar."""
    # These would lead to evil.example if they were put into a Location.
    attacks = [
        ("host-userinfo", "CVE-2026-34835", "mail.example.com@evil.example"),
        ("host-userinfo-port", "CVE-2026-34835", "mail.example.com:80@evil.example"),
        ("host-userinfo-tab", "WHATWG URL 4.4", "mail.example.com\t@evil.example"),
        ("host-fragment", "CVE-2021-22881", "evil.example#mail.example.com"),
        ("host-query", "CVE-2026-48710", "evil.example?mail.example.com"),
        ("host-path", "CVE-2026-48710", "evil.example/mail.example.com"),
        ("host-backslash", "WHATWG URL 4.4", "evil.example\\mail.example.com"),
        ("host-encoded-at", "RFC 3986 2.4", "mail.example.com%40evil.example"),
        ("host-encoded-slash", "RFC 3986 2.4", "evil.example%2Fmail.example.com"),
    ]
    invalid = {
        "host-space": "mail.example.com evil.example",
        "host-quote": 'mail.example.com"',
        "host-less-than": "mail.example.com<",
        "host-at": "user@mail.example.com",
        "host-slash": "mail.example.com/x",
        "host-question-mark": "mail.example.com?x",
        "host-number-sign": "mail.example.com#x",
        "host-percent": "mail.example.com%x",
        "host-8-bit": "b\xfccher.example",
        "host-port-letter": "mail.example.com:80a",
        "host-ipv6-without-brackets": "2001:db8::1",
        "host-ipv6-two-gaps": "[1::2::3]",
        "host-ipv6-open": "[2001:db8::1",
    }
    return [
        *(host_case(SAFE, *row) for row in attacks),
        *(host_case(MUST, id, "RFC 9112 3.2", host, "400") for id, host in invalid.items()),
        # A server must refuse these three, or put a space in their place: then Host is invalid.
        host_case(MUST, "host-folded", "RFC 9112 5.2", "mail.example.com\r\n @evil.example", "400"),
        host_case(MUST, "host-bare-cr", "RFC 9112 2.2", "mail.example.com\rEvil: 1", REFUSED),
        host_case(MUST, "host-nul", "RFC 9110 5.5", "mail.example.com\0.evil.example", REFUSED),
    ]


def host_line_cases(rule: RedirectRule) -> List[Case]:
    """Return the cases about a missing Host field, two of them, and a blank beside its name."""
    none = b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n"
    none10 = b"GET / HTTP/1.0\r\n\r\n"
    right10 = redirect_by(rule, rule.host) if rule.host else "400"
    id10 = "no-host-http10-fixed" if rule.host else "no-host-http10"
    good, evil = "Host: mail.example.com", "Host: evil.example"
    reversed_hosts = head_of(GET, good, host=EVIL)
    hosts10 = head_of("GET / HTTP/1.0", evil)
    blank = head_of(GET).replace(b"Host", b"Host ")
    after_blank = head_of(GET + "\r\n Host: evil.example")
    return [
        case(MUST, "no-host", "RFC 9112 3.2", "HTTP/1.1 without Host", none, "400"),
        case(OWN, id10, "RFC 9112 3.3", "HTTP/1.0 without Host", none10, right10),
        field_case(MUST, "two-hosts-equal", "RFC 9112 3.2", good, "400"),
        field_case(MUST, "two-hosts", "RFC 9112 3.2", evil, "400"),
        case(MUST, "two-hosts-reversed", "RFC 9112 3.2", "two Hosts", reversed_hosts, "400"),
        case(MUST, "two-hosts-http10", "RFC 9112 3.2", "two Hosts", hosts10, "400"),
        case(MUST, "host-space-before-colon", "RFC 9112 5.1", "a blank after Host", blank, "400"),
        case(SAFE, "host-after-blank", "RFC 9112 2.2", "a blank before Host", after_blank),
    ]


def malformed_cases() -> List[Case]:
    """Return the cases about other lines that are not in the grammar."""
    lines = [
        ("malformed-method", "RFC 9112 3", "GE(T / HTTP/1.1"),
        ("get-asterisk", "RFC 9112 3.2.4", "GET * HTTP/1.1"),
        ("two-spaces", "RFC 9112 3", "GET  / HTTP/1.1"),
        ("tab-for-space", "RFC 9112 3", "GET\t/ HTTP/1.1"),
        ("no-target", "RFC 9112 3", "GET HTTP/1.1"),
        ("version-zeros", "RFC 9112 2.3", "GET / HTTP/01.01"),
        ("version-two-digits", "RFC 9112 2.3", "GET / HTTP/1.10"),
        ("version-without-minor", "RFC 9112 2.3", "GET / HTTP/1"),
        ("version-lower-case", "RFC 9112 2.3", "GET / http/1.1"),
        ("version-space", "RFC 9112 2.3", "GET / HTTP/ 1.1"),
    ]
    targets = [
        ("target-fragment", "RFC 9112 3.2", "/a#b"),
        ("target-space", "RFC 9112 3.2", "/a b"),
        ("target-nul", "RFC 9112 3.2", "/a\0b"),
        ("target-bare-cr", "RFC 9112 2.2", "/a\rEvil:1"),
    ]
    fields = [
        ("folded-field", "RFC 9112 5.2", "X-A: a\r\n b"),
        ("no-colon", "RFC 9112 5", "nonsense"),
        ("no-field-name", "RFC 9112 5", ": a"),
        ("malformed-field-name", "RFC 9112 5", "X[A]: a"),
        ("8-bit-field-name", "RFC 9112 5", "X-\xef: a"),
        ("bare-cr", "RFC 9112 2.2", "X-A: a\rHost: evil.example"),
        ("bare-lf", "RFC 9112 2.2", "X-A: a\nHost: evil.example"),
        ("nul", "RFC 9110 5.5", "X-A: a\0b"),
        ("bell", "RFC 9110 5.5", "X-A: a\ab"),
        ("del", "RFC 9110 5.5", "X-A: a\x7fb"),
    ]
    return [
        *(line_case(OWN, *row, "400") for row in lines),
        *(get_case(OWN, *row, "400") for row in targets),
        *(field_case(OWN, *row, "400") for row in fields),
        field_case(MUST, "space-before-colon", "RFC 9112 5.1", "X-A : b", "400"),
        field_case(MUST, "tab-before-colon", "RFC 9112 5.1", "X-A\t: b", "400"),
    ]


def head_cases(rule: RedirectRule) -> List[Case]:
    """Return the cases about heads: how they begin, how their lines end, and how long they are."""
    home = redirect_by(rule)
    wrong = ("400", "505")
    get = head_of(GET)
    only_lf = get.replace(b"\r\n", b"\n")
    http2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    hello = b"\x16\x03\x01\0\xa5\x01\0\0\xa1\x03\x03" + bytes(160)
    proxy_1 = b"PROXY TCP4 192.0.2.1 192.0.2.2 5 80\r\n" + get
    proxy_2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes(12) + get
    path = "/" + "a" * 7900
    same = redirect_by(rule, path=path)
    long, too_long = head_of(f"GET {path} HTTP/1.1"), head_of(f"GET /{'a' * 100000} HTTP/1.1")
    method, head = head_of("A" * 100000 + " / HTTP/1.1"), head_of(GET, *["X: aaaa"] * 11000)
    return [
        case(OWN, "empty-line-first", "RFC 9112 2.2", "an empty line first", b"\r\n" + get, home),
        case(OWN, "words-first", "RFC 9112 3", "words before GET", b"Extra line" + get, "400"),
        case(OWN, "only-lf", "RFC 9112 2.2", "a bare LF at the end of each line", only_lf, "400"),
        field_case(OWN, "8-bit-field-value", "RFC 9110 5.5", "X-A: \xef", home),
        case(OWN, "http09", "RFC 9112 C.1", "HTTP/0.9", b"GET /\r\n", *wrong),
        line_case(OWN, "http37", "RFC 9110 15.6.6", "GET / HTTP/3.7", *wrong),
        case(OWN, "http2-preface", "RFC 9113 3.4", "the preface of HTTP/2", http2, *wrong),
        case(OWN, "tls-hello", "RFC 8446 4.1.2", "TLS", hello, CLOSED, "400"),
        case(OWN, "proxy-protocol-1", "PROXY protocol", "a balancer's PROXY line", proxy_1, "400"),
        case(OWN, "proxy-protocol-2", "PROXY protocol", "its header in binary", proxy_2, "400"),
        case(OWN, "target-7900", "RFC 9112 3", "a target of 7900 bytes", long, same),
        case(OWN, "target-100000", "RFC 9112 3", "a target of 100 KB", too_long, "414"),
        case(OWN, "method-100000", "RFC 9112 3", "a method of 100 KB", method, "400", "431", "501"),
        case(OWN, "head-100000", "RFC 6585 5", "a head of 100 KB", head, "431", "400"),
    ]


def body_cases(rule: RedirectRule) -> List[Case]:
    """Return the cases about the end of a request: no part of a body is the next request."""
    home = redirect_by(rule)
    keep = "keep-alive"
    evil = head_of(GET, host=EVIL)
    other = head_of(GET, host="other.example")
    length = f"Content-Length: {len(evil)}"
    overflow = head_of(GET, f"Content-Length: {2**64}", connection=keep)
    post = "POST / HTTP/1.1"
    chunked = "Transfer-Encoding: chunked"
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(evil), evil)
    body = head_of(post, length, connection=keep) + evil
    body_of_get = head_of(GET, length, connection=keep) + evil
    body_chunked = head_of(post, chunked, connection=keep) + chunks
    once, chunked_once = head_of(post, length) + evil, head_of(post, chunked) + chunks
    twice = head_of(GET, connection=keep) + head_of(GET, host="192.0.2.7")
    both = "421" if home == "421" else f"{home}, {redirect_by(rule, '192.0.2.7')}"
    no_more = "nothing after Connection: close"
    return [
        case(SAFE, "body", "RFC 9112 9.3", "a body is not a request", body),
        case(SAFE, "body-of-get", "RFC 9112 9.3", "GET with a body", body_of_get),
        case(SAFE, "body-chunked", "RFC 9112 9.3", "a body in chunks", body_chunked),
        case(SAFE, "body-overflow", "RFC 9110 8.6", "2 ** 64 is not 0", overflow + evil),
        case(OWN, "body-once", "RFC 9112 9.3", "POST with a body", once, home),
        case(OWN, "body-chunked-once", "RFC 9112 9.3", "POST with chunks", chunked_once, home),
        case(MUST, "close", "RFC 9112 9.6", no_more, head_of(GET) + other, ONCE, REFUSED),
        case(OWN, "pipelined", "RFC 9112 9.3.2", "two requests, in order", twice, both),
    ]


def length_cases(rule: RedirectRule) -> List[Case]:
    """Return the cases about fields that say how long a body is."""
    invalid = {
        "length-letters": "Content-Length: abc",
        "length-negative": "Content-Length: -1",
        "length-plus": "Content-Length: +5",
        "length-hex": "Content-Length: 0x5",
        "length-underscore": "Content-Length: 1_0",
        "length-space": "Content-Length: 1 0",
        "length-list": "Content-Length: 5, 6",
    }
    huge = "Content-Length: 99999999999999999999"  # more than an integer type holds
    post = "POST / HTTP/1.1"
    chunked = "Transfer-Encoding: chunked"
    both = ("Content-Length: 5", chunked)
    lengths = head_of(GET, "Content-Length: 0", "Content-Length: 5")
    empty = b"0\r\n\r\n"
    two = empty + head_of(GET, host="other.example")
    last_gzip = head_of(post, "Transfer-Encoding: chunked, gzip")
    chunked_twice = head_of(post, chunked, chunked) + empty
    length_first = head_of(post, *both) + empty
    both_keep = head_of(post, *both, connection="keep-alive") + two
    http10_keep = head_of("POST / HTTP/1.0", chunked, connection="keep-alive") + two
    closes = "the connection is closed"
    return [
        *(field_case(MUST, id, "RFC 9112 6.3", field, "400") for id, field in invalid.items()),
        case(MUST, "length-twice", "RFC 9112 6.3", "two lengths that differ", lengths, "400"),
        field_case(OWN, "length-huge", "RFC 9110 8.6", huge, redirect_by(rule), "413"),
        case(MUST, "coding-not-chunked", "RFC 9112 6.3", "chunked, gzip", last_gzip, "400", "501"),
        case(OWN, "coding-chunked-twice", "RFC 9112 6.1", "chunked, twice", chunked_twice, "400"),
        case(OWN, "length-and-coding", "RFC 9112 6.3", "both fields", length_first, "400"),
        case(MUST, "length-and-coding-close", "RFC 9112 6.1", closes, both_keep, ONCE, REFUSED),
        case(MUST, "coding-http10-close", "RFC 9112 6.1", closes, http10_keep, ONCE, REFUSED),
    ]


def absolute_form_cases(rule: RedirectRule) -> List[Case]:
    """Return the cases about a request target that is a whole URI."""
    to = TO + (rule.host or MAIL)
    home, path = redirect_by(rule), redirect_by(rule, path="/a?b")
    other = head_of("GET http://mail.example.com/x HTTP/1.1", host="other.example")
    first = head_of("GET http://mail.example.com:8080/ HTTP/1.1", host="other.example")
    uri, user = "http://mail.example.com", "http://user@mail.example.com/"
    what = "the URI's host, not the Host field"
    attacks = [
        ("absolute-form-no-host", "RFC 9110 4.2.1", "http:///evil.example/"),
        ("absolute-form-one-slash", "RFC 3986 4.3", "http:/evil.example/"),
        ("absolute-form-backslash", "WHATWG URL 4.4", "http://evil.example\\@mail.example.com/"),
        ("absolute-form-fragment", "RFC 9112 3.2.2", "http://mail.example.com#@evil.example/"),
    ]
    return [
        get_case(MUST, "absolute-form", "RFC 9112 3.2.2", f"{uri}/x", to, ACCEPTED),
        get_case(MUST, "absolute-form-no-path", "RFC 9112 3.2.2", uri, to, ACCEPTED),
        case(MUST, "absolute-form-host", "RFC 9112 3.2.2", what, other, to, REFUSED),
        case(OWN, "absolute-form-first", "RFC 9112 3.2.2", what, first, home),
        get_case(MUST, "absolute-form-userinfo", "RFC 9110 4.2.4", user, to, REFUSED),
        get_case(OWN, "absolute-form-path", "RFC 9112 3.2.2", "HTTP://mail.example.com/a?b", path),
        get_case(OWN, "absolute-form-root", "RFC 9110 4.2.3", uri, home),
        get_case(OWN, "absolute-form-refused", "RFC 9110 4.2.4", user, "400"),
        # A proxy has terminated TLS, and the browser has asked for this URI: a redirect would loop.
        get_case(OWN, "absolute-form-https", "RFC 9110 7.4", "https://mail.example.com/", "421"),
        get_case(OWN, "absolute-form-ftp", "RFC 9112 3.2.2", "ftp://mail.example.com/", "400"),
        *(get_case(SAFE, *row) for row in attacks),
    ]


def location_cases(rule: RedirectRule) -> List[Case]:
    """Return the cases about a Location that keeps the path: attacks on it, and its grammar."""
    no_host = b"GET /evil.example/ HTTP/1.0\r\n\r\n"
    empty_host = head_of("GET /evil.example/ HTTP/1.1", host="")
    attacks = [
        ("path-userinfo", "CVE-2026-54282", "@evil.example"),
        ("path-continues-host", "RFC 9112 3.2.1", ".evil.example"),
        ("path-port", "CVE-2026-54282", ":80@evil.example/"),
        ("path-no-authority", "RFC 9112 3.2.2", "http:evil.example/"),
        ("path-two-slashes", "CVE-2021-28861", "//evil.example/%2f.."),
        ("path-three-slashes", "CVE-2021-21330", "///evil.example/"),
        ("path-backslash", "CPython issue 132826", "/\\evil.example/"),
        ("path-encoded-backslash", "Caddy issue 7330", "/%5C%5Cevil.example/%252e%252e"),
        ("path-encoded-slash", "Caddy issue 8023", "/..%2F%5cevil.example%2F%3f%2F..%2F.."),
        ("path-dot-segments", "RFC 3986 5.2.4", "/x/..//evil.example/"),
        ("path-encoded-tab", "WHATWG URL 4.4", "/%09/evil.example/"),
        ("path-crlf", "gixy http_splitting", "/%0d%0aEvil:%201"),
        ("path-crlf-in-query", "gixy http_splitting", "/?%0d%0aEvil:%201"),
        ("path-lf", "gixy http_splitting", "/%0aEvil:%201"),
        ("path-wide-crlf", "RFC 3629 3", "/%E5%98%8D%E5%98%8AEvil:%201"),
    ]
    encoded = redirect_by(rule, path="/%5C%22%3C%3E%5E%60%7B%7C%7D%E9")
    percent = redirect_by(rule, path="/100%25?%25zz")
    return [
        # A browser takes https:///evil.example/ for https://evil.example/.
        case(SAFE, "no-host-http10-path", "RFC 9110 4.2.2", "no host in Location", no_host),
        case(SAFE, "host-empty-path", "RFC 9110 4.2.2", "no host in Location", empty_host),
        *(get_case(SAFE, *row) for row in attacks),
        get_case(MUST, "location-grammar", "RFC 9110 2.2", '/"<>^`{|}\\', A_URI),
        get_case(MUST, "location-percent", "RFC 9110 2.2", "/100%?%zz", A_URI),
        get_case(OWN, "path-outside-url", "RFC 3986 2.1", '/\\"<>^`{|}\xe9', encoded),
        get_case(OWN, "path-lone-percent", "RFC 3986 2.4", "/100%?%zz", percent),
    ]


def path_cases(rule: RedirectRule) -> List[Case]:
    """Return the cases about paths that are kept, those of programs always; and ACME tokens."""
    acme = "/.well-known/acme-challenge/"
    kept = [
        ("mta-sts", "RFC 8461 3.3", "/.well-known/mta-sts.txt?x=1"),
        ("well-known-capitals", "RFC 8615 3", "/.Well-Known/pki-validation/file.txt"),
        ("autodiscover", "Autodiscover", "/autodiscover/autodiscover.xml"),
        ("autodiscover-capitals", "Autodiscover", "/Autodiscover/Autodiscover.xml"),
    ]
    if not rule.acme_dir:
        kept.append(("acme-challenge", "RFC 8555 8.3", f"{acme}a-Token_1"))
    if rule.keep_path:
        kept += [
            ("path-slashes", "RFC 3986 3.3", "//evil.example/x"),
            ("path-encoded", "RFC 3986 6.2.2.2", "/%0d%0aA:b/%2F%00/%7e/x"),
            ("path-dots", "RFC 3986 5.2.4", "/a/../b/./c"),
            ("path-empty-query", "RFC 3986 6.2.3", "/x?"),
            ("path-marks", "RFC 3986 3.3", "/!$&'()*+,;=:@?/?!$&'()*+,;=:@"),
        ]
    itself = redirect_by(rule, path="/.well-known")
    table = [get_case(OWN, "well-known-itself", "RFC 8615 3", "/.well-known", itself)]
    for id, reference, path in kept:
        right = redirect_by(rule, path=path, kept=True)
        table.append(get_case(OWN, id, reference, path, right))
    if rule.acme_dir:
        table += [
            get_case(OWN, "acme-token", "RFC 8555 8.3", f"{acme}a-Token_1", "200"),
            get_case(OWN, "acme-no-token", "RFC 8555 8.3", f"{acme}../a-Token_1", "404"),
            get_case(OWN, "acme-link", "RFC 8555 8.3", f"{acme}link", "404"),
        ]
    return table


def proxy_cases(rule: RedirectRule) -> List[Case]:
    """Return the cases about fields that a proxy sets, and that anyone can send."""
    ignored = [
        ("CVE-2021-44528", "X-Forwarded-Host", "evil.example"),
        ("CVE-2020-15129", "X-Forwarded-Prefix", "//evil.example"),
        ("RFC 3986 3.2.1", "X-Forwarded-Port", "443@evil.example"),
        ("RFC 3986 3.1", "X-Forwarded-Proto", "https://evil.example/?"),
        ("CWE-601", "X-Forwarded-Server", "evil.example"),
        ("CWE-601", "X-Host", "evil.example"),
        ("CWE-601", "X-HTTP-Host-Override", "evil.example"),
        ("CVE-2018-14773", "X-Original-URL", "//evil.example/"),
        ("CVE-2018-14773", "X-Rewrite-URL", "//evil.example/"),
        ("RFC 7239 8.1", "Forwarded", "host=evil.example"),
    ]
    # The browser has spoken HTTPS to the proxy: a redirect would loop.
    loops = {
        "loop-x-forwarded-proto": "X-Forwarded-Proto: https",
        "loop-x-forwarded-proto-list": "X-Forwarded-Proto: WSS, http",
        "loop-front-end-https": "Front-End-Https: on",
        "loop-x-forwarded-ssl": "X-Forwarded-Ssl: on",
        "loop-cloudfront": "CloudFront-Forwarded-Proto: https",
        "loop-x-arr-ssl": "X-ARR-SSL: 2048|256|C=US|CN=mail",
        "loop-forwarded": "Forwarded: for=192.0.2.1;proto=https",
    }
    no_loops = {
        "x-forwarded-proto-http-is-no-loop": "X-Forwarded-Proto: http, https",
        "front-end-https-off-is-no-loop": "Front-End-Https: off",
    }
    table = []
    for reference, name, value in ignored:
        id = f"{name.lower()}-is-ignored"
        table.append(field_case(SAFE, id, reference, f"{name}: {value}"))
    for id, field in loops.items():
        table.append(field_case(OWN, id, "RFC 9110 15.5.20", field, "421"))
    for id, field in no_loops.items():
        table.append(field_case(OWN, id, "RFC 9110 15.5.20", field, redirect_by(rule)))
    return table


def option_cases(rule: RedirectRule) -> List[Case]:
    """Return the cases about allowed names, the health check and APIs."""
    table = []
    if rule.allow_hosts:
        like_allowed = "evil.example#.mail.example.com"
        table += [
            host_case(OWN, "not-allowed", "RFC 9110 15.5.20", "not-allowed.example", "421"),
            host_case(SAFE, "not-allowed-fragment", "CVE-2021-22881", like_allowed),
        ]
    if rule.health:
        table.append(get_case(OWN, "health", "RFC 9110 15.3.1", rule.health, "200"))
    if rule.api:
        # A redirect would hide that the API's client leaks its secrets.
        api = rule.api[0]
        leak = "draft-ietf-httpapi-privacy 3"
        beside = redirect_by(rule, path=f"{api}x")
        table += [
            get_case(OWN, "api", leak, f"{api}/x?y", "403"),
            line_case(OWN, "api-capitals", leak, f"POST {api.upper()}/x HTTP/1.1", "403"),
            get_case(OWN, "api-beside", leak, f"{api}x", beside),
        ]
    return table


def cases(rule: RedirectRule, word: str = "") -> List[Case]:
    """Return the cases that apply to a server with this rule, and contain this word."""
    table = [
        *method_cases(rule),
        *host_cases(rule),
        *invalid_host_cases(),
        *host_line_cases(rule),
        *malformed_cases(),
        *head_cases(rule),
        *body_cases(rule),
        *length_cases(rule),
        *absolute_form_cases(rule),
        *path_cases(rule),
        *(location_cases(rule) if rule.keep_path else []),
        *proxy_cases(rule),
        *option_cases(rule),
    ]
    return [one for one in table if word in one.id or word in one.what]


# ---- The self-test: what came back ---------------------------------------------------


class Result(NamedTuple):
    """What came of a case."""

    id: str
    level: str  # the case's own, or SAFE where an attack has worked
    reference: str
    what: str
    expected: str
    got: str
    passed: bool


LINGER = 0.5  # seconds to wait for a second answer, where the server leaves the connection open


def leads_to(location: str) -> str:
    """Return the host that a browser is led to, "" where it stays or refuses (WHATWG URL, 4.4)."""
    url = location.replace("\t", "").replace("\\", "/")
    scheme, colon, rest = url.partition(":")
    if colon and scheme.lower() == "https":
        url = "//" + rest
    elif colon and scheme.lower() == "http":  # without slashes it is a path, as Chromium reads it
        url = rest
    if not url.startswith("//"):
        return ""
    authority = re.split("[/?#]", url.lstrip("/"))[0]
    host = unquote(authority.rpartition("@")[2].partition(":")[0]).lower()
    return "" if any(char <= " " or char in "#%/<>?@[\\]^|\x7f" for char in host) else host


def attack_in(answer: Response) -> str:
    """Return how this answer makes an attack work, "" if it does not."""
    if answer.values("evil"):
        return "a field that the request has written"
    for location in answer.values("location"):
        if "\r" in location:
            return "a CR, which ends a line for some clients"
        host = leads_to(location).rstrip(".")
        if host.endswith(EVIL):
            return f"leads to {host}"
    return ""


def no_response(data: bytes) -> str:
    """Return why read_response() finds no response in these bytes, and how they begin."""
    if not STATUS_LINE.match(data):
        fault = "not HTTP/1"
    elif END_OF_HEAD.search(data):
        fault = "a NUL in the head"
    else:
        fault = "a head without its end"
    return f"{fault}: {data[:40].decode('latin-1')}"


def describe(answers: List[Response], rest: bytes, error: Optional[OSError]) -> str:
    """Return what came: "STATUS Location" for each answer, and what does not belong there."""
    texts = []
    for answer in answers:
        text = " ".join([str(answer.status), *answer.values("location")])
        framed = answer.values("content-length") + answer.values("transfer-encoding")
        texts.append(f"{text} (cut off)" if framed and not answer.complete else text)
    if rest:
        texts.append(no_response(rest))
    if not texts:
        texts.append("no answer in time" if isinstance(error, socket.timeout) else CLOSED)
    return ", ".join(texts)


# RFC 3986 section 2: the characters of a URI.
URI_TEXT = re.compile(r"(?:[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*")


def demands_met(answer: Response) -> Set[str]:
    """Return which of the things that a MUST can ask for are true of this answer."""
    location = answer.field("location")
    met = set()
    if answer.status >= 200:
        met.add(ONCE)
    if location is None or URI_TEXT.fullmatch(location):
        met.add(A_URI)
    url = re.fullmatch("https://([^/]*?)(:[0-9]*)?(/.*)?", location or "")
    if url:
        met.add(TO + url.group(1))
    if location is None and answer.status >= 400:
        met.add(REFUSED)
        if answer.status > 400:
            met.add(ACCEPTED)
    return met


def judge(case: Case, answers: List[Response], rest: bytes, error: Optional[OSError]) -> Result:
    """Return the result of a case that got these answers."""
    expected = " or ".join(case.right) or f"nothing that leads to {EVIL}"
    got = describe(answers, rest, error)
    met = {got}
    if got == CLOSED:
        met.add(REFUSED)
    if len(answers) == 1 and not rest:
        met |= demands_met(answers[0])
    level = case.level
    passed = not case.right or not met.isdisjoint(case.right)
    if case.field:
        wanted = f"{case.field}: {case.value}" if case.value else f"no {case.field}"
        expected = f"{expected}, {wanted}" if case.right else wanted
    for answer in answers:
        if case.field and answer.field(case.field) != case.value:
            got += f", {case.field}: {answer.field(case.field)}"
            passed = False
        attack = attack_in(answer)
        if attack:
            got += f" ({attack})"
            level, passed = SAFE, False
    return Result(case.id, level, case.reference, case.what, expected, got, passed)


def read_answers(data: bytes, head_only: bool) -> Tuple[List[Response], bytes]:
    """Return the answers in what came, interim ones too, and what is left after them."""
    answers = []
    while data:
        answer, data = read_response(data, head_only)
        if answer is None:
            break
        answers.append(answer)
    return answers, data


def try_case(address: Address, case: Case, seconds: float) -> Result:
    """Send a case to the server at this address, and judge what comes back."""
    head_only = case.request.startswith(b"HEAD ")

    def is_answered(data: bytes) -> bool:
        answers, _ = read_answers(data, head_only)
        return bool(answers) and answers[-1].complete and answers[-1].status >= 200

    try:
        with socket.create_connection(address, seconds) as sock:
            data, error = converse(sock, case.request, time.monotonic() + seconds, is_answered)
            if not error:
                data += converse(sock, b"", time.monotonic() + LINGER)[0]
    except OSError as refused:  # that says nothing about the case
        got = f"no connection: {refused.strerror or refused}"
        return Result(case.id, OWN, case.reference, case.what, "a connection", got, False)
    return judge(case, *read_answers(data, head_only), error)


def try_cases(
    address: Address, rule: RedirectRule, word: str = "", seconds: float = 3.0
) -> List[Result]:
    """Send the cases that contain this word to the server with this rule, eight at a time."""
    from concurrent.futures import ThreadPoolExecutor  # not at the top: no other command needs it

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda case: try_case(address, case, seconds), cases(rule, word)))


def read_page(connection: http.client.HTTPConnection, path: str) -> Tuple[str, str]:
    """Return "STATUS Location" and the body, as the standard library's client reads them."""
    try:
        connection.request("GET", path, headers={"Host": "localhost"})
        response = connection.getresponse()
        return f"{response.status} {response.getheader('Location')}", response.read().decode()
    except (OSError, http.client.HTTPException) as error:
        return str(error), ""
    finally:
        connection.close()


def try_end_to_end() -> List[Result]:
    """Do the article's step 18: ask over plain HTTP, and follow the redirect to HTTPS.

    The only certificate that the client trusts is the stub's.
    """
    with running(StubServer(("127.0.0.1", 0))) as (_, https_port):
        rule = RedirectRule(https_port=https_port)
        with running(RedirectServer(("127.0.0.1", 0), rule=rule)) as address:
            redirect, _ = read_page(http.client.HTTPConnection(*address, timeout=5), "/")
        context = ssl.create_default_context(cadata=STUB_CERTIFICATE)
        secure = http.client.HTTPSConnection("localhost", https_port, timeout=5, context=context)
        status, body = read_page(secure, "/exchange")
    right, title = f"302 https://localhost:{https_port}/exchange", StubHandler.title
    results = []
    for id, what, expected, got in (
        ("step-18-redirect", "plain HTTP leads to HTTPS", right, redirect),
        ("step-18-https", "HTTPS is verified", title, title if title in body else status),
    ):
        passed = got == expected
        results.append(Result(id, OWN, "Q279681, step 18", what, expected, got, passed))
    return results


def own_rules(acme_dir: str) -> List[RedirectRule]:
    """Return the rules that the self-test serves; each case applies to at least one of them."""
    every_option = RedirectRule(
        keep_path=True,
        allow_hosts=(MAIL,),
        health="/health",
        acme_dir=acme_dir,
        api=("/api",),
    )
    return [RedirectRule(), RedirectRule(host=MAIL, status=301), every_option]


def try_ourselves(word: str = "") -> List[Result]:
    """Try listener and stub end to end, then the listener with each of our rules.

    A case has one result: its first failure, if it fails with any of the rules.
    """
    results = [one for one in try_end_to_end() if word in one.id or word in one.what]
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "a-Token_1"), "w") as file:
            file.write("a-Token_1.thumbprint")
        with contextlib.suppress(OSError):  # Windows may forbid links
            os.symlink(file.name, os.path.join(folder, "link"))
        by_id: Dict[str, Result] = {}
        for rule in own_rules(folder):
            with running(RedirectServer(("127.0.0.1", 0), rule=rule)) as address:
                for result in try_cases(address, rule, word):
                    if result.id not in by_id or by_id[result.id].passed:
                        by_id[result.id] = result
    return results + list(by_id.values())


# ---- The demo ------------------------------------------------------------------------


class BeforeHandler(StubHandler):
    """Answers plain HTTP as IIS does before the fix."""

    status, title = 403, "The page must be viewed over a secure channel"

    def story(self) -> Story:
        return [
            (
                "You asked for it over plain HTTP. "
                "Type https:// at the beginning of the address, and try again.",
                "HTTP 403.4 - Forbidden: SSL required\nInternet Information Services",
            ),
            ("In this demo, type:", self.server.secure_url),  # type: ignore[attr-defined]
        ]


class DemoHandler(RedirectHandler):
    """Tells of each answer as it is given."""

    def reply_to(self, head: bytes) -> Answer:
        result = super().reply_to(head)
        method = head.partition(b" ")[0].decode("latin-1") if result.target else "-"
        self.server.on_answer(log_escape(method), result)  # type: ignore[attr-defined]
        return result


class Demo:
    """What the redirect and the stub of a demo tell the person in front of it."""

    def __init__(self) -> None:
        self.port = 0  # of plain HTTP
        self.untold: Optional[Answer] = None  # the last redirect, until the stub's page shows it

    def tell_plain(self, method: str, result: Answer) -> None:
        if result.location:
            self.untold = result
        outcome = result.location or result.refusal
        target = log_escape(result.target) or "-"
        print(f"http   {method} {target}  {result.status} {outcome}", flush=True)

    def tell_secure(self, line: str) -> None:
        print(f"https  {line}", flush=True)

    def story(self, host: str) -> Story:
        """Return how the browser came to the stub at this Host."""
        untold, self.untold = self.untold, None
        if untold is None:
            return [("You came straight here: nothing was redirected.", f"https://{host}")]
        name = host.partition(":")[0]  # never IPv6: the demo listens on 127.0.0.1
        typed = f"http://{with_port(name, self.port, 80)}{untold.target}"
        return [
            ("You typed an address without https.", typed),
            (
                "owahttps answered with a redirect.",
                f"HTTP/1.1 {untold.status} {PHRASES[untold.status]}\nLocation: {untold.location}",
            ),
        ]


# ======== Part two: beyond the article =================================================


# ---- Recipes ------------------------------------------------------------------------

# IIS 7 and later: a Web site of its own.  http.sys gives a request to the binding that names its
# host before it looks at those for any host (Microsoft Learn, "UrlPrefix Strings"), so no other
# site has to change.  The attributes and values are those of Microsoft's IIS_schema.xml, where
# only IIS 10 has PermRedirect.

IIS_STATUS = {301: "Permanent", 302: "Found", 307: "Temporary", 308: "PermRedirect"}
# The folders whose paths every rule keeps, as RedirectRule.keeps_path() does.
IIS_MACHINE_FOLDERS = (".well-known", "autodiscover")

SITE_CLICKS_UNDO = """\
To undo the clicks: remove the site owahttps, then the application pool owahttps (IIS Manager
makes one with the site), and delete the folder.
"""
SITE_CMD = """\
@echo off
rem {http} to {https} by a Web site of its own.
rem This has not been tested on Windows: read it first. Run it in a Command Prompt as administrator.
setlocal
set "APPCMD=%windir%\\system32\\inetsrv\\appcmd.exe"
set "ROOT=%SystemDrive%\\inetpub\\owahttps"
set "REDIRECT=-section:system.webServer/httpRedirect -commit:apphost -enabled:true"
set "WHY=HTTP Redirection (Web-Http-Redirect) is not installed, or the prompt is not elevated."
%APPCMD% list module HttpRedirectionModule >nul || goto failed
set "WHY=The site owahttps exists already. To recreate it, run owahttps-undo.cmd first."
%APPCMD% list site owahttps >nul && goto failed
set "WHY=Stopped half-way. owahttps-undo.cmd undoes what was done."
if not exist "%ROOT%" md "%ROOT%" || goto failed
%APPCMD% add site /name:owahttps /bindings:"{bindings}" /physicalPath:"%ROOT%" || goto failed
{settings}%APPCMD% list site owahttps
echo It must say state:Started, else another site has the same binding. Test from another machine.
exit /b 0
:failed
echo %WHY%
exit /b 1
"""
# A site's settings stand in <location> elements of applicationHost.config, apart from the site.
SITE_UNDO = """\
@echo off
rem Deletes the site owahttps and its settings. No other site is touched.
rem This has not been tested on Windows: read it first. Run it in a Command Prompt as administrator.
setlocal
set "APPCMD=%windir%\\system32\\inetsrv\\appcmd.exe"
set "ROOT=%SystemDrive%\\inetpub\\owahttps"
set "REDIRECT=-section:system.webServer/httpRedirect -commit:apphost"
%APPCMD% list site >nul || goto failed
rem What was never set cannot be cleared, and that is no failure.
%APPCMD% clear config owahttps/.well-known %REDIRECT% >nul 2>&1
%APPCMD% clear config owahttps/autodiscover %REDIRECT% >nul 2>&1
%APPCMD% clear config owahttps %REDIRECT% >nul 2>&1
%APPCMD% clear config owahttps -section:system.webServer/httpProtocol -commit:apphost >nul 2>&1
%APPCMD% list site owahttps >nul || goto gone
%APPCMD% delete site owahttps || goto failed
:gone
if exist "%ROOT%" rd "%ROOT%"
echo There is no site owahttps.
exit /b 0
:failed
echo That failed. Is this a Command Prompt as administrator?
exit /b 1
"""


def site_names(rule: RedirectRule) -> Tuple[str, ...]:
    """Return the names that the site is bound to."""
    return (rule.host, *sorted(rule.allow_hosts - {rule.host}))


def refuse_what_iis_cannot(recipe: str, rule: RedirectRule) -> None:
    """Raise RuleError if a site of its own cannot do what the rule wants."""
    if not rule.host:
        raise RuleError(f"{recipe} needs --host: the site is bound to that name")
    for name in site_names(rule):
        if is_address(name.strip("[]")):
            raise RuleError(f"{recipe} needs names: IIS binds no site to the host name {name}")
    if rule.health:
        raise RuleError(f"{recipe} cannot do --health: the site answers every path with a redirect")
    if rule.acme_dir:
        raise RuleError(f"{recipe} cannot do --acme-dir: win-acme answers by a listener of its own")
    if rule.api:
        raise RuleError(f"{recipe} cannot do --api: IIS's redirect does not send 403")


def site_redirects(rule: RedirectRule) -> List[Tuple[str, str, bool]]:
    """Return where in the site a redirect is set, its destination, and whether that is exact.

    If it is not exact, IIS appends the rest of the request's path, below that place.
    """
    origin = "https://" + rule.authority("")
    if rule.keep_path:
        return [("owahttps", origin, False)]
    redirects = [("owahttps", origin + rule.path, True)]
    for folder in IIS_MACHINE_FOLDERS:
        redirects.append((f"owahttps/{folder}", f"{origin}/{folder}", False))
    return redirects


def site_notes(recipe: str, rule: RedirectRule) -> str:
    """Return what the site does, and when not to use it."""
    others = '"Exchange Back End"' if recipe == "exchange" else "the other sites"
    names = " and\n".join(site_names(rule))
    notes = f"""\
A Web site of its own redirects {names}.
"Default Web Site" and {others} are left alone: IIS gives a request to the binding that
names its host, before those for any host (Microsoft Learn, "UrlPrefix Strings").
"""
    if recipe == "exchange":
        notes += """\
 - Microsoft's own procedure differs: it redirects the existing site, and removes the redirect
   from each virtual directory. Here no setting of Exchange changes, so no update can undo it.
 - Not for a name that programs still ask for in the clear: the server's own FQDN (the Exchange
   Management Shell opens http://FQDN/PowerShell), or the OAB's InternalUrl of 2007 and 2010.
"""
    notes += """\
 - Click the steps or run owahttps.cmd, not both. Neither has been tested on Windows.
 - Not behind a load balancer that terminates TLS: the redirect would loop. Redirect there.
 - The role service HTTP Redirection must be installed: in PowerShell, Install-WindowsFeature
   Web-Http-Redirect.
 - Requests for other names, and for addresses, go to the other sites as before.
"""
    if rule.keep_path:
        notes += """\
 - IIS appends path and query. Whether it changes any byte was not verified.
"""
    else:
        notes += """\
 - /.well-known/ and /autodiscover/ keep their paths: certificate authorities and Outlook need
   that. The suffix that IIS appends there was not verified.
"""
    if rule.status == 308:
        notes += " - Status 308 needs IIS 10 (Windows Server 2016).\n"
    if rule.status in (307, 308):
        notes += " - Outlook's Autodiscover is documented to follow 301 and 302 only.\n"
    return notes


def site_steps(rule: RedirectRule, port: int) -> str:
    """Return the clicks in IIS Manager that make the site."""
    first, *others = site_names(rule)
    folder = "C:\\inetpub\\owahttps"
    folders = folder
    if not rule.keep_path:
        folders = " ".join(f"{folder}\\{name}" for name in IIS_MACHINE_FOLDERS)
    steps = [
        f"At a command prompt, type: md {folders}",
        "Open Internet Information Services (IIS) Manager and expand the server.",
        "Right-click Sites and click Add Website (IIS 7: Add Web Site).",
        f"Site name: owahttps. Physical path: {folder}. Type: http. Port: {port}.\n"
        f"    Host name: {first}. Click OK.",
    ]
    for name in others:
        steps.append(
            "Right-click the site owahttps, click Edit Bindings, then Add.\n"
            f"    Type: http. Port: {port}. Host name: {name}. Click OK."
        )
    for place, destination, exact in site_redirects(rule):
        tick = "Select" if exact else "Clear"
        steps.append(
            f"Select {place} and double-click HTTP Redirect.\n"
            f'    Select "Redirect requests to this destination" and type {destination}\n'
            f'    {tick} "Redirect all requests to exact destination (instead of relative to'
            f' destination)".\n'
            f"    Status code: {rule.status}. Click Apply."
        )
    text = ""
    for number, step in enumerate(steps, 1):
        text += f"{number:2}. {step}\n"
    return text + SITE_CLICKS_UNDO


def site_script(rule: RedirectRule, port: int) -> str:
    """Return owahttps.cmd, which does the same by appcmd."""
    settings = ""
    for place, destination, exact in site_redirects(rule):
        settings += (
            f"%APPCMD% set config {place} %REDIRECT% -httpResponseStatus:{IIS_STATUS[rule.status]}"
            f' -exactDestination:{str(exact).lower()} -destination:"{destination}" || goto failed\n'
        )
    if rule.status in PERMANENT:
        settings += (
            "%APPCMD% set config owahttps -section:system.webServer/httpProtocol -commit:apphost"
            " /+\"redirectHeaders.[name='Cache-Control',value='max-age=86400']\" || goto failed\n"
        )
    return SITE_CMD.format(
        http=f"http://{with_port(rule.host, port, 80)}/",
        https=rule.location(rule.host, "/"),
        bindings=",".join(f"http/*:{port}:{name}" for name in site_names(rule)),
        settings=settings,
    )


def site_recipe(recipe: str, rule: RedirectRule, port: int) -> List[Part]:
    """Return the parts of a recipe for IIS 7 and later, `exchange` or `iis`."""
    refuse_what_iis_cannot(recipe, rule)
    path = "/autodiscover/autodiscover.xml" if recipe == "exchange" else "/.well-known/x?y=z"
    verify = f"""\
From another machine: {check_command(rule, port)}
Also: curl -I 'http://{with_port(rule.host, port, 80)}{path}'
      Location must be {rule.location(rule.host, path)}
"""
    if recipe == "exchange":
        verify += "As before: OWA, ECP, EWS, ActiveSync, OAB, Outlook, Exchange Management Shell.\n"
    return [
        Part("notes", site_notes(recipe, rule)),
        Part("steps", site_steps(rule, port)),
        Part("script", site_script(rule, port), "owahttps.cmd"),
        Part("undo", SITE_UNDO, "owahttps-undo.cmd"),
        Part("verify", verify),
    ]


# The other servers.  Each has a function that yields its configuration, piece by piece.

# What a Host may be.  Addresses are not examined further: 1::2::3 passes.
ANY_HOST = r"[a-z0-9](?:[a-z0-9_-]|\.[a-z0-9])*|\[[0-9a-f:.]+\]"
MACHINE_PATTERN = r"/(?:\.well-known|autodiscover)/"
ACME_PATTERN = r"^/\.well-known/acme-challenge/([A-Za-z0-9_-]+)$"
# LOOP_SIGNS, in terms that all these servers have.
PROXY_FIELDS = {
    "X-Forwarded-Proto": "^(https|wss)",
    "Front-End-Https": "^on$",
    "X-Forwarded-Ssl": "^on$",
    "Forwarded": "^[^,]*proto=.?(https|wss)",
    "CloudFront-Forwarded-Proto": "^https$",
    "X-ARR-SSL": ".",
}

# Comments that several configurations have.
LOOPS = "# A proxy that already speaks HTTPS: a redirect would loop."
NO_REDIRECT = "# No redirect: a client of an API would send its secret in the clear each time."
LAYOUTS = "# TOKEN in the folder, or .well-known/acme-challenge/TOKEN as of certbot --webroot."
A_DAY = "# Otherwise browsers keep it for ever, even if it was wrong."


def allowed_names(rule: RedirectRule) -> str:
    """Return a regular expression for the names of --allow-host."""
    return "|".join(map(re.escape, sorted(rule.allow_hosts)))


def missing_host(rule: RedirectRule) -> str:
    """Return "?" where a request of HTTP/1.0 without a Host leads to the fixed one."""
    return "?" if rule.host else ""


def api_pattern(path: str) -> str:
    """Return a regular expression for a path and all below it."""
    return f"^{re.escape(path)}(?:/|$)"


def nginx_exceptions(rule: RedirectRule) -> Iterator[str]:
    """Yield the lines for paths that are not redirected."""
    if rule.health:
        yield f"    location = {rule.health} {{ return 200; }}\n"
    if rule.api:
        yield f"    {NO_REDIRECT}\n"
    for path in rule.api:
        yield f'    location ~* "{api_pattern(path)}" {{ return 403; }}\n'
    if rule.acme_dir:
        yield f"""\
    {LAYOUTS}
    location ~ "{ACME_PATTERN}" {{
        disable_symlinks on "from={rule.acme_dir}";
        root "{rule.acme_dir}";
        try_files /$1 $uri =404;
    }}
"""


def nginx_host(rule: RedirectRule) -> Iterator[str]:
    """Yield the lines that refuse a request whose Host is no valid or no allowed name."""
    missing = missing_host(rule)
    yield f"""\
        # $host has no port and no capitals, but nginx lets @ # ? % and the like pass.
        if ($host !~ "^({ANY_HOST}){missing}$") {{ return 400; }}
        # $host ends at the first colon: what comes then is a port, or invalid.
        if ($http_host !~ "^([^:]*|\\[[^]]*])(:[0-9]*)?$") {{ return 400; }}
"""
    if rule.allow_hosts:
        yield f'        if ($host !~ "^({allowed_names(rule)}){missing}$") {{ return 421; }}\n'


def nginx_config(rule: RedirectRule, port: int) -> Iterator[str]:
    origin = "https://" + rule.authority("$host")
    yield f"""\
# Delete other default servers of this port, such as /etc/nginx/sites-enabled/default.
# This is for every name that has no server block of its own.  A block that names the
# host, or listens on one address, comes first: delete its part for plain HTTP.  Sites
# that listen only on IPv4 need "listen [::]:{port};" beside this.
server {{
    listen {port} default_server;
    # Delete this line where IPv6 is off:
    listen [::]:{port} default_server;
    # There is no server_name: it would be the $host of a request without one.
"""
    yield from nginx_exceptions(rule)
    yield "    location / {\n"
    yield from nginx_host(rule)
    yield f"        {LOOPS}\n"
    for field, pattern in PROXY_FIELDS.items():
        variable = "$http_" + field.lower().replace("-", "_")
        yield f'        if ({variable} ~* "{pattern}") {{ return 421; }}\n'
    if rule.status in PERMANENT:
        yield f"""\
        {A_DAY}
        add_header Cache-Control max-age=86400;
"""
    if not rule.keep_path:
        yield f"""\
        if ($request_uri ~* "^{MACHINE_PATTERN}") {{
            return {rule.status} {origin}$request_uri;
        }}
"""
    path = "$request_uri" if rule.keep_path else rule.path
    yield f"""\
        return {rule.status} {origin}{path};
    }}
}}
"""


def apache_exceptions(rule: RedirectRule) -> Iterator[str]:
    """Yield the lines for paths that are not redirected."""
    if rule.health:
        yield f"""\
    ErrorDocument 200 "OK"
    RewriteRule ^{re.escape(rule.health)}$ - [R=200]
"""
    if rule.api:
        yield f"    {NO_REDIRECT}\n"
    for path in rule.api:
        yield f'    RewriteRule "{api_pattern(path)}" - [NC,F]\n'
    if rule.acme_dir:
        yield f"""\
    {LAYOUTS}
    RewriteCond "{rule.acme_dir}/$1" -f
    RewriteRule "{ACME_PATTERN}" "{rule.acme_dir}/$1" [L]
    RewriteRule "{ACME_PATTERN}" "{rule.acme_dir}$0" [L]
    <Directory "{rule.acme_dir}">
        Options None
        Require all granted
    </Directory>
"""


def apache_redirect(rule: RedirectRule) -> Iterator[str]:
    """Yield the lines that redirect what has not been refused."""
    origin = "https://" + rule.authority("%{SERVER_NAME}")
    kept = "/" if rule.keep_path else MACHINE_PATTERN
    yield f"""\
    # THE_REQUEST is as it came, never decoded. Apache appends the query.
    RewriteCond %{{THE_REQUEST}} "^\\S+ (?:[a-z]+://[^/? ]*)?({kept}[^? ]*)" [NC]
    RewriteRule ^ {origin}%1 [NE,L,R={rule.status}]
"""
    if rule.keep_path:  # "GET http://a.example" has no path
        yield f"    RewriteRule ^ {origin}/ [L,R={rule.status}]\n"
    else:
        yield f"    RewriteRule ^ {origin}{rule.path} [QSD,L,R={rule.status}]\n"


def apache_config(rule: RedirectRule, port: int) -> Iterator[str]:
    yield "# No other site of this port may sort before it: a2dissite 000-default\n"
    if port != 80:
        yield f"# Delete this line where ports.conf has it:\nListen {port}\n"
    yield f"""\
<VirtualHost *:{port}>
    # SERVER_NAME is the Host then: in lower case, without port and last dot.
    UseCanonicalName Off
    # Otherwise %2F gets 404.
    AllowEncodedSlashes NoDecode
"""
    if rule.status in PERMANENT:
        yield f"""\
    {A_DAY}
    Header always set Cache-Control max-age=86400 "expr=%{{REQUEST_STATUS}} == {rule.status}"
"""
    yield """\
    RewriteEngine on
    RewriteCond %{REQUEST_METHOD} ^(CONNECT|TRACE)$
    RewriteRule ^ - [R=405]
"""
    yield from apache_exceptions(rule)
    yield f"    {LOOPS}\n"
    for field, pattern in PROXY_FIELDS.items():
        yield f'    SetEnvIfNoCase {field} "{pattern}" loop\n'
    rest = missing_host(rule) + r"\.?(:[0-9]*)?$"
    yield f"""\
    RewriteCond %{{ENV:loop}} .
    RewriteRule ^ - [R=421]
    RewriteCond %{{HTTP_HOST}} "!^({ANY_HOST}){rest}" [NC]
    RewriteRule ^ - [R=400]
"""
    if rule.allow_hosts:
        yield f"""\
    RewriteCond %{{HTTP_HOST}} "!^({allowed_names(rule)}){rest}" [NC]
    RewriteRule ^ - [R=421]
"""
    yield from apache_redirect(rule)
    yield "</VirtualHost>\n"


def haproxy_exceptions(rule: RedirectRule) -> Iterator[str]:
    """Yield the lines for paths that are not redirected."""
    if rule.health:
        yield f"    monitor-uri {rule.health}\n"
    if rule.api:
        yield f"    {NO_REDIRECT}\n"
    for path in rule.api:
        yield f"""\
    http-request deny deny_status 403 if {{ path,url_dec -i -m reg '{api_pattern(path)}' }}
"""


def haproxy_host(rule: RedirectRule) -> Iterator[str]:
    """Yield the lines that set txn.host to the server name, or refuse the request."""
    yield f"""\
    # In lower case, without port and last dot; the rest of Host is as it came.
    http-request set-var(txn.host) req.fhdr(host),lower,regsub(:[0-9]*$,),regsub(\\.$,)
    http-request deny deny_status 400 unless {{ var(txn.host) -m reg '^({ANY_HOST})$' }}
"""
    if rule.allow_hosts:
        names = " ".join(sorted(rule.allow_hosts))
        yield f"    http-request deny deny_status 421 unless {{ var(txn.host) -m str {names} }}\n"


def haproxy_config(rule: RedirectRule, port: int) -> Iterator[str]:
    origin = "https://" + rule.authority("%[var(txn.host)]")
    yield f"""\
# If you have such a file already, add only the frontend to it.
global
    user haproxy
    group haproxy
frontend owahttps
    bind *:{port}
    # Delete this line where IPv6 is off:
    bind :::{port} v6only
    mode http
    # One for silence, one for a whole head.
    timeout client 10s
    timeout http-request 10s
    # HAProxy 2.6 takes a Content-Length of 2 ** 64 for 0, and the body for a request.
    option httpclose
    log stdout format raw daemon
    option httplog
    http-request deny deny_status 405 if METH_CONNECT or METH_TRACE
"""
    yield from haproxy_exceptions(rule)
    yield f"    {LOOPS}\n"
    for field, pattern in PROXY_FIELDS.items():
        yield f"    acl loop req.fhdr({field}) -i -m reg '{pattern}'\n"
    yield "    http-request deny deny_status 421 if loop\n"
    yield from haproxy_host(rule)
    yield "    http-request deny deny_status 400 unless { path_beg / }\n"
    if rule.status in PERMANENT:
        yield f"""\
    {A_DAY}
    http-after-response set-header Cache-Control max-age=86400 if {{ status {rule.status} }}
"""
    redirect = f"    http-request redirect code {rule.status} location {origin}"
    if rule.keep_path:
        yield f"{redirect}%[pathq]\n"
    else:
        yield f"{redirect}%[pathq] if {{ path -i -m beg /.well-known/ /autodiscover/ }}\n"
        yield f"{redirect}{rule.path}\n"


def caddy_exceptions(rule: RedirectRule) -> Iterator[str]:
    """Yield the lines for paths that are not redirected."""
    if rule.health:
        yield f"\t\trespond {rule.health} 200\n"
    if rule.api:
        yield f"\t\t{NO_REDIRECT}\n"
    for path in rule.api:
        yield f"\t\trespond {path} 403\n\t\trespond {path}/* 403\n"
    if rule.acme_dir:
        # Where try_files finds no file, the path stays: that of the other layout.
        yield f"""\
\t\t{LAYOUTS}
\t\t@acme path_regexp acme `{ACME_PATTERN}`
\t\thandle @acme {{
\t\t\troot * "{rule.acme_dir}"
\t\t\ttry_files /{{re.acme.1}}
\t\t\tfile_server
\t\t}}
"""


def caddy_redirect(rule: RedirectRule) -> Iterator[str]:
    """Yield the lines that redirect what has not been refused."""
    origin = "https://" + rule.authority("{re.host.1}")
    if rule.status in PERMANENT:
        yield f"""\
\t\t\t{A_DAY}
\t\t\theader Cache-Control max-age=86400
"""
    if rule.keep_path:
        yield f"\t\t\tredir {origin}{{uri}} {rule.status}\n"
    else:
        yield f"""\
\t\t\tredir /.well-known/* {origin}{{uri}} {rule.status}
\t\t\tredir /autodiscover/* {origin}{{uri}} {rule.status}
\t\t\tredir {origin}{rule.path} {rule.status}
"""


def caddy_config(rule: RedirectRule, port: int) -> Iterator[str]:
    yield f"http://:{port} {{\n"
    yield """\
\tlog
\t# In this order:
\troute {
\t\t@never method CONNECT TRACE
\t\trespond @never 405
\t\t# "x:@evil" is a target too, and {uri} would put it behind the host.
\t\t@target not expression `{http.request.uri}.startsWith("/")`
\t\trespond @target 400
"""
    yield from caddy_exceptions(rule)
    yield f"\t\t{LOOPS}\n"
    for field, pattern in PROXY_FIELDS.items():
        yield f"\t\t@{field} header_regexp {field} `(?i){pattern}`\n\t\trespond @{field} 421\n"
    rest = r"\.?(:[0-9]*)?$"
    yield f"""\
\t\t# Not {{host}}: it has no brackets round IPv6 and may hold @ # ? %
\t\t@host header_regexp host Host `(?i)^({allowed_names(rule) or ANY_HOST}){rest}`
\t\troute @host {{
"""
    yield from caddy_redirect(rule)
    yield "\t\t}\n"
    if rule.allow_hosts:
        yield f"""\
\t\t@valid header_regexp Host `(?i)^({ANY_HOST}){rest}`
\t\trespond @valid 421
"""
    yield "\t\trespond 400\n\t}\n}\n"


# What `serve` takes unless it is told otherwise; both need file descriptors.
MAX_CONNECTIONS = 16384  # some 45 MB, if all of them are slow
SPARE_FILES = 64  # for files, and for clients that are being accepted
SYSTEMD_UNIT = """\
[Unit]
Description=Redirect from plain HTTP to HTTPS
After=network.target

[Service]
ExecStart=/usr/bin/python3 -I /usr/local/bin/owahttps.py serve --port {port}{options}
# It exits with 0 on SIGHUP too, which some log rotations send.
Restart=always
# This implies ProtectSystem=strict, NoNewPrivileges, RestrictSUIDSGID, PrivateTmp and RemoveIPC.
DynamicUser=yes
AmbientCapabilities=CAP_NET_BIND_SERVICE
CapabilityBoundingSet=CAP_NET_BIND_SERVICE
# One for each connection, and {spare} more.
LimitNOFILE={files}
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


def systemd_config(rule: RedirectRule, port: int) -> Iterator[str]:
    folder = "/" + os.path.normpath(rule.acme_dir).lstrip("/") if rule.acme_dir else ""
    for hidden in ("/home", "/root", "/tmp", "/var/tmp", "/run/user"):
        if f"{folder}/".startswith(f"{hidden}/"):
            raise RuleError(f"systemd cannot do --acme-dir {folder}: the unit hides {hidden}")
    yield SYSTEMD_UNIT.format(
        port=port,
        options=command_options(rule),
        spare=SPARE_FILES,
        files=MAX_CONNECTIONS + SPARE_FILES,
    )


class Server(NamedTuple):
    """Another server: where its file goes, what comes then, and its configuration."""

    place: str
    then: str
    config: Callable[[RedirectRule, int], Iterator[str]]


SERVERS = {
    "nginx": Server(
        "/etc/nginx/conf.d/owahttps.conf",
        "nginx -t && systemctl reload nginx",
        nginx_config,
    ),
    "apache": Server(
        "/etc/apache2/sites-available/000-owahttps.conf",
        "a2dissite 000-default; a2enmod rewrite headers && a2ensite 000-owahttps"
        " && systemctl reload apache2",
        apache_config,
    ),
    "haproxy": Server(
        "/etc/haproxy/haproxy.cfg",
        "haproxy -c -f /etc/haproxy/haproxy.cfg && systemctl reload haproxy",
        haproxy_config,
    ),
    "caddy": Server("/etc/caddy/Caddyfile", "systemctl reload caddy", caddy_config),
    "systemd": Server(
        "/etc/systemd/system/owahttps.service",
        "systemctl daemon-reload && systemctl enable --now owahttps",
        systemd_config,
    ),
}


def server_recipe(name: str, rule: RedirectRule, port: int) -> List[Part]:
    """Return the recipe of another server: one file."""
    if rule.acme_dir and name == "haproxy":
        raise RuleError("haproxy cannot do --acme-dir: it serves no files")
    if rule.acme_dir and not RULE_PATH.fullmatch(rule.acme_dir):
        raise RuleError(
            f"--acme-dir {rule.acme_dir!a} is not an absolute folder of A-Z a-z 0-9 . _ ~ - /"
        )
    server = SERVERS[name]
    # Debian ships a file of that name.
    where = "In place of " if name in ("haproxy", "caddy") else ""
    text = f"# {where}{server.place}; then: {server.then}\n" + "".join(server.config(rule, port))
    return [Part("file", text, os.path.basename(server.place))]


RECIPES = {
    "exchange2000": "Exchange 2000 on IIS 5.0: Microsoft's article Q279681",
    "exchange2003": "Exchange 2003 on IIS 6.0: the same method",
    "exchange": "Exchange 2007, 2010, 2013, 2016, 2019 and SE: a Web site of its own",
    "iis": "any other application on IIS 7 or later, by the same method",
    "nginx": "nginx 1.18 or newer",
    "apache": "Apache httpd 2.4",
    "haproxy": "HAProxy 2.2 or newer",
    "caddy": "Caddy 2.4 or newer",
    "systemd": "a hardened systemd unit for owahttps.py serve",
}


def recipe_parts(recipe: str, rule: RedirectRule, port: int) -> List[Part]:
    """Return the parts of this recipe; RuleError where it cannot express the rule."""
    if recipe in ("exchange2000", "exchange2003"):
        return article_recipe(recipe, rule, port)
    if recipe in SERVERS:
        return server_recipe(recipe, rule, port)
    return site_recipe(recipe, rule, port)


# ---- The check -----------------------------------------------------------------------

# Theory of operation.
#
# The question is what a browser and its user get at http://HOST/.  So every request, every URL
# and every handshake here is as lenient as browsers are.  What this machine lacks (IPv6, a store
# of authorities, a route) is never called the site's fault.
#
# A Site lives as long as a target: the URL that is asked for, the rule that must hold, the time
# that is left, and what was found.  A Visit lives as long as one address of the site: two
# addresses may be two machines, so answers, TLS and time-outs are remembered for each address.
#
# A visit asks in this order:
#
#   1. Does the plain port take a connection?  If not: does HTTPS, and what is its page?
#   2. Where does a browser land from /, from the path of the target, from the path of the rule,
#      and from a deep link?  Every hop is followed here.  Each of the four begins without
#      cookies, and the same URL with the same cookies is asked for once.
#   3. Before the first request to an HTTPS origin: what is its certificate?  OpenSSL reports only
#      the first fault of a certificate.  So if one is not trusted, more handshakes follow, and
#      each asks one question.
#   4. Last, what no visitor asks: an ACME path, and an invalid Host.
#
# After one time-out an origin is asked nothing more.  Without that, a host that is down would
# cost ten seconds a question.
#
# http.client would not do: its time-out holds for each recv(), so a server that sends a byte now
# and then has no end.  Nor http.cookiejar: it prints a traceback for some hostile dates.

# Every kind of finding by its severity: its id, and what was seen and what to do.  The id is that
# of the MDN HTTP Observatory (redirection-..., hsts-...) or of hstspreload.org (with dots) where
# theirs means the same; for certificates, MDN's id is followed by the fault.
# HSTS is Strict-Transport-Security (RFC 6797).  The severities begin with the mildest: where all is
# well, the good redirect is the headline, and not a note.
FINDINGS = {
    "note": {
        "redirection-temporary": "{url} answers {status}: make it permanent once HTTPS is settled",
        "header.preloadable.max_age.below_1_year": "{url} sends HSTS of {age} s, less than a year",
        "hsts-from-parent": "{url} sends no HSTS of its own, but that of {parent} covers it",
        "client-certificate-wanted": "{url} wants a client certificate: its page was not seen",
        "host-reflected": "{url} puts a forged Host into its Location: a cache may store that",
    },
    "ok": {
        "redirection-to-https": "{url} goes to {location}",
    },
    "warning": {
        "redirects.http.does_not_exist": "nothing answers at {url} {why}, but HTTPS does; "
        "if that is meant: --ignore redirects.http.does_not_exist",
        "redirection-by-refresh": "{url} answers {status} with a refresh to {location}: "
        "send a redirect, which every client follows",
        "redirection-off-host-from-http": "{url} leads to another host, {location}: "
        "lead to https on the same host first",
        "location-not-a-uri": "{url} has the invalid Location {location}: only browsers correct it",
        "redirects.too_many": "{url} takes more than 3 redirects: lead to the last URL at once",
        "acme-challenge-lost": "{url} loses its path, to {location}, and http-01 fails: "
        "keep the path",
        "https-error": "{url} answers {status}: look at the HTTPS server",
        "tls-old": "HTTPS at {url} is old ({what}): browsers open it, stricter clients do not",
        "cert-expires-soon": "the certificate of {url} expires {date}, in {days} days: renew it",
        "response.no_header": "{url} sends no usable HSTS: browsers will try http:// again",
        "response.multiple_headers": "{url} sends several HSTS fields: browsers take the first one",
        "hsts-implemented-max-age-less-than-six-months": "{url} sends HSTS of {age} s, less than "
        "15552000 (180 days)",
        "redirects.http.useless_header": "{url} sends HSTS in the clear, where browsers ignore it",
        "cookie-over-http": "{url} sets a cookie in the clear: anyone on the way can read it",
        "cookie-without-secure": "{url} sets a cookie without Secure: it goes in the clear too",
    },
    "unknown": {
        "target-invalid": "the target is invalid: {error}",
        "host-unknown": "no address was found for {url}{option} {why}",
        "address-unreachable": "this machine cannot reach {url} {why}: try -4 or -6",
        "no-authorities": "this machine has no certificate authorities, so the certificate of "
        "{url} cannot be judged: install ca-certificates here, or give --ca-file",
        "https-only-http2": "HTTPS at {url} speaks only HTTP/2, which owahttps does not",
        "cut-short": "the check of {url} ended after {seconds} s, unfinished: raise --timeout",
    },
    "critical": {
        "nothing-answers": "neither {url} nor {secure} answers {why}: look at that host and its "
        "server",
        "http-no-answer": "{url} gave no answer {why}: look at its server",
        "http-garbled": "{url} does not answer in HTTP: see what listens there",
        "domain.tls.cannot_connect": "no HTTPS at {url} {why}: start it, or redirect elsewhere",
        "tls-too-old": "HTTPS at {url} speaks only TLS 1.1 or older: turn TLS 1.2 on",
        "https-misdirected": "{url} answers 421: it does not serve this name (see SNI)",
        "redirection-missing": "{url} answers {status} in the clear: redirect it to https",
        "iis-403.4": "{url} answers IIS's 403.4: SSL is required, but steps 5-10 of Q279681 "
        "(Custom Errors, 403;4) are not done",
        "iis-asp-port-test": "{url} answers an empty 200, as Owahttps.asp does on a port that it "
        "does not test: see owahttps.py generate --port",
        "redirection-not-to-https-on-initial-redirection": "{url} first leads to {location}: "
        "lead to https at once",
        "redirection-not-to-https": "{url} ends at {location}: it must end on https",
        "redirects.insecure.initial": "{url} leads to plain HTTP, {location}: use https",
        "redirects.insecure.subsequent": "{url} leads back to plain HTTP, {location}: use https",
        "redirect-loop": "{url} is redirected without end. Behind a load balancer that terminates "
        "TLS, redirect there and not on the server",
        "proxy-loop": "{url} answers owahttps's 421: the proxy that terminates TLS sends HTTPS "
        "traffic to the redirect. Send it to the application",
        "location-invalid": "{url} answers {status} with an invalid Location ({location}): "
        "correct it",
        "location-keeps-plain-port": "{url} keeps the plain port in {location}: drop it",
        "rule-mismatch": "{url} answers {status} {location}, not {expected}",
        "redirection-invalid-cert.expired": "the certificate of {url} expired {date}: renew it",
        "redirection-invalid-cert.not-yet-valid": "the certificate of {url} is not valid before "
        "{date}: use an earlier one, or set the clock of this machine",
        "redirection-invalid-cert.name": "the certificate of {url} does not name {host}: get one "
        "that does, or redirect to a name it has (--host)",
        "redirection-invalid-cert.self-signed": "the certificate of {url} is self-signed: get one "
        "from an authority, or give --ca-file",
        "redirection-invalid-cert.chain": "the certificate of {url} does not lead to a trusted "
        "authority {why}: send the intermediate certificates, or give --ca-file",
    },
}
SEVERITY_OF = {id: severity for severity, group in FINDINGS.items() for id in group}
SEVERITIES = ["ignored", *FINDINGS]
ALARMS = ("warning", "unknown", "critical")
EXIT_CODES = {"ok": 0, "warning": 1, "critical": 2, "unknown": 3}  # the monitoring world's

MAX_HOPS = 20  # requests of one chain: Chromium refuses the twentieth redirect (measured)
MAX_ANSWER = 256 * 1024  # bytes that are read from one response: Chromium's limit for a head
MAX_COOKIES = 50
MAX_PRINTED_HOPS = 16  # a site that keeps paths, with two addresses, has 14
TARGET_TIME_OUTS = 6  # no target takes longer than this many time-outs
DAY = 86400
PORTS = {"http": 80, "https": 443}

FORGED_HOST = "forged.invalid"  # RFC 2606: nobody can own it
DEEP_LINK = "/inbox/?cmd=contents&x=a%2Fb"  # a bookmark; "%2F" shows whether it is decoded
ACME_QUESTION = ACME_PREFIX + "owahttps-check"

Trust = Dict[str, Any]  # cafile, capath or cadata; empty: this machine's authorities


def text_of(id: str, **values: Any) -> str:
    """Return what a finding says, in printable ASCII."""
    escaped = {key: log_escape(str(value), 320) for key, value in values.items()}
    # A "|" would begin the performance data of a monitoring plugin.
    return FINDINGS[SEVERITY_OF[id]][id].format(**escaped).replace("|", "\\x7C")


class Finding(NamedTuple):
    """One kind of thing that was seen at a site, good or bad."""

    id: str
    severity: str  # one of SEVERITIES
    text: str  # printable ASCII without "|": what was seen where, and what to do
    urls: List[str]  # all URLs or origins that it was seen at


class Hop(NamedTuple):
    """One request and its answer."""

    url: str
    status: int  # 0: no answer, or no connection
    location: str
    milliseconds: int
    address: str  # the one that was asked


class Report(NamedTuple):
    """What check() found."""

    target: str
    severity: str  # ok, warning, unknown or critical: the worst finding's; a note is ok
    hops: List[Hop]
    findings: List[Finding]  # the worst ones first

    def headline(self) -> str:
        """Return the worst finding, how many more need attention, and which are ignored."""
        ignored = [one.id for one in self.findings if one.severity == "ignored"]
        bad = [one for one in self.findings if one.severity in ALARMS]
        worst = self.findings[0]
        text = "nothing else was found" if worst.severity == "ignored" else worst.text
        if len(bad) > 1:
            text += f" (+{len(bad) - 1} more)"
        if ignored:
            text += f" ({len(ignored)} ignored: {', '.join(ignored)})"
        return text


# ---- The check: URLs as browsers read them -------------------------------------------

C0_AND_BLANK = bytes(range(0x21)).decode("ascii")
# RFC 9110 section 4.2.4 deprecates userinfo; "https:/h" is a path for some clients.
NOT_FOR_ALL_CLIENTS = re.compile("(?i)https?:(?!//[^/])|(?:https?:)?//[^/?#]*@")


class Url(NamedTuple):
    """An http or https URL, as a browser asks for it."""

    scheme: str
    name: str  # as split_authority() gives it
    port: int
    target: str  # path and query

    def authority(self) -> str:
        """Return the value of the Host field."""
        return with_port(self.name, self.port, PORTS[self.scheme])

    def origin(self) -> str:
        """Return the URL without its path."""
        return f"{self.scheme}://{self.authority()}"

    def __str__(self) -> str:
        return self.origin() + self.target


def ascii_authority(text: str) -> str:
    """Return name[:port] in ASCII: "bücher.example" is "xn--bcher-kva.example".

    Not the codec "idna", which is IDNA 2003: it asks for strasse.de where browsers ask for
    straße.de.
    """
    name, colon, port = text.partition(":")
    labels = []
    for label in unicodedata.normalize("NFKC", name.lower()).replace("\u3002", ".").split("."):
        if any(character >= "\x80" for character in label):
            if len(label) > 63:  # the codec's time grows with the square of it
                raise HostError(f"{label[:300]!a} is longer than the 63 characters of a label")
            label = "xn--" + label.encode("punycode").decode("ascii")
        labels.append(label)
    return ".".join(labels) + colon + port


def resolve(text: str, base: Url) -> Url:
    """Return where a browser at base goes for this text (WHATWG URL section 4.4).

    Each character of the text is a byte.  ValueError: a browser shows an error, or the scheme
    is another one.
    """
    text = re.sub(r"[\t\r\n]", "", text.strip(C0_AND_BLANK)).partition("#")[0]
    path, mark, query = text.partition("?")
    path = path.replace("\\", "/")
    start = re.match("(?s)([A-Za-z][A-Za-z0-9+.-]*):(.*)", path)
    scheme, path = start.groups() if start else (base.scheme, path)
    scheme = scheme.lower()
    if scheme not in PORTS:
        raise ValueError(f"{scheme[:20]!a} is not http or https")
    if path.startswith("//") or scheme != base.scheme:  # from http, "https:/h" is https://h/
        path = f"{scheme}://{path.lstrip('/')}"
    elif path[:1] not in ("", "/"):  # from https, "https:x" is x; a colon in it is no scheme's
        path = "./" + path
    parts = urlsplit(urljoin(str(base), path + mark + query))
    host = parts.netloc.rpartition("@")[2].encode("latin-1").decode("utf-8")
    name, port = split_authority(ascii_authority(host))
    target = (parts.path or "/") + ("?" + parts.query if parts.query else "")
    return Url(parts.scheme, name, port or PORTS[parts.scheme], percent_encode(target))


def read_target(text: str) -> Tuple[Url, Url]:
    """Return the plain URL and the HTTPS URL of a site, from what people paste.

    That is a host, host:port, host/path, or an http or https URL.  ValueError says what is wrong.
    """
    url = text if "://" in text else "http://" + text
    if re.search(r"[\x00-\x20\x7f]", url):
        raise ValueError(f"{text[:300]!a} has a blank or a control character")
    if url.rpartition("://")[2].strip("/\\") == "":
        raise ValueError(f"{text[:300]!a} names no host")
    if re.match(r"\w+://[^/?#\\]*@", url):
        raise ValueError(f"{text[:300]!a} has userinfo")
    latin = url.encode("utf-8", "surrogateescape").decode("latin-1")
    given = resolve(latin, Url("http", "", 80, "/"))
    if given.scheme == "http":
        return given, given._replace(scheme="https", port=443)
    return given._replace(scheme="http", port=80), given


# ---- The check: what a response says -------------------------------------------------


class Cookie(NamedTuple):
    """What one chain of redirects needs of a Set-Cookie field."""

    pair: str  # NAME=VALUE; browsers take one without "=" too
    domain: str  # it goes to this name and to names below it
    path: str  # it goes to this path and to paths below it
    secure: bool
    deleted: bool

    def goes_to(self, url: Url) -> bool:
        """Return whether a browser sends this cookie to url (RFC 6265 section 5.4)."""
        path = url.target.partition("?")[0]
        inside = path == self.path or path.startswith(self.path.rstrip("/") + "/")
        below = f".{url.name}".endswith(f".{self.domain}")
        return below and inside and not self.deleted and (url.scheme == "https" or not self.secure)


def is_deleted(attributes: Dict[str, str]) -> bool:
    """Return whether a cookie with these attributes is being deleted."""
    age = attributes.get("max-age", "")
    if re.fullmatch("-?[0-9]+", age):  # it goes before Expires
        return age.startswith("-") or not age.strip("0")
    try:
        when = parsedate_tz(attributes.get("expires", "")[:100])
        return when is not None and mktime_tz(when) < time.time()
    except (ValueError, TypeError, IndexError, OverflowError):  # not a date
        return False


def read_cookies(response: Response, url: Url) -> List[Cookie]:
    """Read the Set-Cookie fields of url's answer, without those that browsers ignore."""
    cookies = []
    for field in response.values("set-cookie")[:MAX_COOKIES]:
        first, *rest = [part.partition("=") for part in field.split(";")]
        # RFC 6265bis section 5.6: an attribute with a longer value is ignored.
        attributes = {
            name.strip().lower(): value.strip() for name, _, value in rest if len(value) <= 1024
        }
        pair = "".join(part.strip() for part in first)
        domain = attributes.get("domain", "").lower().lstrip(".") or url.name
        path = attributes.get("path", "")
        if not path.startswith("/"):  # RFC 6265 section 5.1.4
            path = url.target.partition("?")[0].rpartition("/")[0] or "/"
        cookie = Cookie(pair, domain, path, "secure" in attributes, is_deleted(attributes))
        name, of_other_sites = pair.lower(), attributes.get("samesite", "").lower() == "none"
        needs_secure = of_other_sites or name.startswith(("__secure-", "__host-"))
        is_refused = (
            not pair.strip("=")
            or len(pair) > 4097  # name and value have at most 4096 bytes
            or re.search(r"[\x00-\x08\x0a-\x1f\x7f]", field)
            or not f".{url.name}".endswith(f".{domain}")
            # RFC 6265bis section 5.7: what these names and SameSite=None promise has to be so.
            or (needs_secure and not cookie.secure)
            or (name.startswith("__host-") and (path != "/" or attributes.get("domain")))
        )
        if not is_refused:
            cookies.append(cookie)
    return cookies


class Hsts(NamedTuple):
    """What a Strict-Transport-Security field says."""

    max_age: int
    covers_subdomains: bool


def read_hsts(field: str) -> Optional[Hsts]:
    """Read a Strict-Transport-Security field; None if it is invalid, which browsers ignore."""
    directives: Dict[str, str] = {}
    for directive in field.split(";"):
        name, _, value = directive.partition("=")
        name = name.strip().lower()
        if name and name in directives:
            return None
        directives[name] = value.strip()
    age = re.fullmatch('("?)([0-9]+)\\1', directives.get("max-age", ""))
    if not age:
        return None
    seconds = int(age.group(2).lstrip("0")[:18] or 0)
    return Hsts(seconds, seconds > 0 and "includesubdomains" in directives)


# Each tag is bounded, so that no page takes long.
META = re.compile(r"(?i)<meta\s[^<>]{0,1000}>")
REFRESH = re.compile(r"(?i)\shttp-equiv\s*=\s*[\"']?refresh\b")
CONTENT = re.compile(r"(?is)^.*?\scontent\s*=\s*[\"']?")
# What no browser with scripts takes for a tag.
HIDDEN = re.compile(r"(?is)<!--.*?(?:-->|\Z)|<noscript\b.*?(?:</noscript|\Z)")
# HTML section 4.2.5.3, with at most 10 seconds: a page that tells people to wait is no redirect.
REFRESH_NOW = re.compile(
    r"(?i)\s*0*(?:10|[0-9])(?:\.[0-9.]*)?(?:\s*[;,]|\s)\s*(?:url\s*=\s*)?[\"']?([^\"'\s>]+)"
)


def refresh_of(response: Response, url: Url) -> str:
    """Return the URL that a page leads to at once, by the field Refresh or a meta tag, or "".

    A page may reload itself.  Over https only plain HTTP counts, and the body is not read.
    """
    texts = response.values("refresh")
    if url.scheme == "http":
        tags = META.findall(HIDDEN.sub("", response.body.decode("latin-1")))
        texts += [CONTENT.sub("", tag) for tag in tags if REFRESH.search(tag)]
    for match in filter(None, map(REFRESH_NOW.match, texts)):
        with contextlib.suppress(ValueError):  # browsers ignore an invalid one
            location = match.group(1).replace("&amp;", "&")
            following = resolve(location, url)
            if following.origin() != url.origin() and "http" in (url.scheme, following.scheme):
                return location
    return ""


def is_redirect(response: Response) -> bool:
    """Return whether a browser follows this response's Location."""
    return response.status in (301, 302, 303, 307, 308)


def final_response(data: bytes) -> Optional[Response]:
    """Return the first response that is not an interim one (103 Early Hints and the like)."""
    answers, _ = read_answers(data, head_only=False)
    return next((answer for answer in answers if answer.status >= 200), None)


def plain_fault(response: Response) -> str:
    """Return the id of the finding where plain HTTP answers with a page."""
    # IIS 5 and 6 show "403.4" and a sentence.  From IIS 7 on, a visitor from elsewhere gets a
    # bare 403, and the number is shown only on the server.
    iis = "IIS" in (response.field("server") or "")
    page = response.body.decode("latin-1")
    about_ssl = re.search("403[.;]4|secured? (with|channel)", page)
    other_403 = re.search("403[.;][0-9]", page)
    if response.status == 403 and (about_ssl or (iis and not other_403)):
        return "iis-403.4"
    if response.status == 200 and iis and not page:
        return "iis-asp-port-test"
    return "redirection-missing"


def secure_fault(response: Response) -> str:
    """Return the id of the finding for an answer over https, or "" if it is fine."""
    page = response.body.decode("latin-1")
    if response.status == 421:
        return "proxy-loop" if "redirect loop" in page else "https-misdirected"
    if response.status == 400 and "required SSL certificate" in page:  # as nginx says it
        return "client-certificate-wanted"
    return "https-error" if response.status >= 500 else ""


# ---- The check: TLS ------------------------------------------------------------------

# What Chromium offers in TLS 1.2, tried one by one; Firefox has little more.  OpenSSL's DEFAULT is
# another set: it has DHE, and CBC with ECDSA or SHA-384, which Chromium refuses.  Python's own set
# differs from version to version.
BROWSER_CIPHERS = (
    "ECDHE+AESGCM:ECDHE+CHACHA20:ECDHE-RSA-AES128-SHA:ECDHE-RSA-AES256-SHA:"
    "RSA+AESGCM:AES128-SHA:AES256-SHA"
)
if ssl.OPENSSL_VERSION.startswith("OpenSSL ") and ssl.OPENSSL_VERSION_INFO >= (1, 1):
    # No SHA-1 signatures, and keys of 1024 bits or more, whatever openssl.cnf says.  LibreSSL
    # (macOS's own Python) and OpenSSL 1.0.2 (CentOS 7) have no such levels.
    BROWSER_CIPHERS += ":@SECLEVEL=1"
# Constants of OpenSSL that Python names late (3.12, 3.10) or not at all.
OP_LEGACY_SERVER_CONNECT = 0x4
X509_PARTIAL_CHAIN = 0x80000
X509_NO_CHECK_TIME = 0x200000
# Errors are known by their text: Python 3.6 has no reason for some of them.
TLS_FAULTS = {
    "tls-too-old": "(?i)alert.protocol.version|unsupported.protocol|wrong.ssl.version",
    "https-only-http2": "(?i)no.application.protocol",
}
# The alerts of a server that wants a certificate: 116, 42 and 40.
CLIENT_CERTIFICATE_ALERT = re.compile(
    "(?i)alert.(certificate.required|bad.certificate|handshake.failure)"
)
# A connect() that fails with one of these never left this machine.  EACCES and EPERM come from
# a firewall on it.
NO_WAY = (
    errno.ENETUNREACH,
    errno.ENETDOWN,
    errno.EADDRNOTAVAIL,
    errno.EAFNOSUPPORT,
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
)
TIME_OUT = (socket.timeout, TimeoutError)
# OpenSSL's names of ciphers with forward secrecy and authenticated encryption.
MODERN_CIPHER = re.compile("TLS_|ECDHE.*(GCM|CHACHA20)")


class Handshake(NamedTuple):
    """What came of a handshake."""

    certificate: bytes = b""  # in DER
    fields: Dict[str, Any] = {}  # of a trusted certificate, as getpeercert() gives them
    cipher: str = ""
    refused: str = ""  # why the certificate was refused


def tls_context(trust: Optional[Trust], flags: int = 0) -> ssl.SSLContext:
    """Return a context with the settings of browsers, the same on every Python.

    trust  None: take every certificate
    flags  of X509_VERIFY_PARAM

    Not ssl.create_default_context(): its ciphers and flags change with Python.  Since 3.13 it
    sets X509_STRICT, which the authorities of many companies fail.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers(BROWSER_CIPHERS)
    context.set_alpn_protocols(["http/1.1"])
    if hasattr(context, "minimum_version"):  # from Python 3.7 on
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    else:
        context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    context.options |= OP_LEGACY_SERVER_CONNECT  # speak to servers without RFC 5746, too
    context.verify_flags = ssl.VerifyFlags(X509_PARTIAL_CHAIN | flags)
    context.check_hostname = False  # is_named() does it
    if trust is None:
        context.verify_mode = ssl.CERT_NONE
    elif trust:
        context.load_verify_locations(**trust)
    else:
        context.load_default_certs()
    return context


def has_authorities(context: ssl.SSLContext) -> bool:
    """Return whether a context trusts any authority; OpenSSL reads those of a folder late."""
    folder = ssl.get_default_verify_paths().capath
    return context.cert_store_stats()["x509"] > 0 or bool(folder and glob(f"{folder}/*"))


def is_named(fields: Dict[str, Any], name: str) -> bool:
    """Return whether a browser takes a certificate with these fields for a server name."""
    # Not check_hostname: each Python has its own idea of "m*.h", of a final dot, and of "*.h" for
    # "a_b.h".  The common name never counts.
    name = name.strip("[]")
    entries = fields.get("subjectAltName", ())
    if is_address(name):
        # Python 3.6 ends an IPv6 address with a line end.
        texts = [text.strip() for kind, text in entries if kind == "IP Address"]
        return any(is_address(text) and ip_address(text) == ip_address(name) for text in texts)
    below = name.partition(".")[2]
    wanted = [name, f"*.{below}"] if "." in below else [name]
    texts = [re.sub(r"\.\Z", "", text.lower()) for kind, text in entries if kind == "DNS"]
    return any(text in wanted for text in texts)


def has_no_way(error: Exception) -> bool:
    """Return whether this machine is the reason of an error.

    The subclasses gaierror and SSLError have numbers of their own, which mean something else.
    """
    return type(error) in (OSError, PermissionError) and getattr(error, "errno", 0) in NO_WAY


def cause_of(error: Exception, seconds: float) -> str:
    """Return why something failed, for the end of a clause; `seconds` is its time-out."""
    text = getattr(error, "strerror", "") or str(error)
    if isinstance(error, TIME_OUT) and not error.errno:
        return f"within {seconds:g} s"
    return "(" + re.sub(r"^\[SSL[^]]*\] | \(_ssl\.c:[0-9]+\)$", "", text) + ")"


def look_up(name: str, port: int, family: int, seconds: float) -> List[Address]:
    """Return the addresses of a server name; OSError if there are none.

    socket.getaddrinfo() has no time-out, so it runs in a thread, which may be left behind.
    """
    rows: List[Any] = []
    failures: List[OSError] = []

    def ask() -> None:
        try:
            rows.extend(socket.getaddrinfo(name.strip("[]"), port, family, socket.SOCK_STREAM))
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(max(seconds, 0.001))
    if not rows:
        raise failures[0] if failures else socket.timeout()
    return sorted({row[4][:2] for row in rows})


# ---- The check: a site and its addresses ---------------------------------------------


class Site:
    """A target: what holds for all of its addresses."""

    def __init__(
        self, plain: Url, secure: Url, expected: Dict[str, Any], trust: Trust, seconds: float
    ) -> None:
        self.plain = plain
        self.rule = RedirectRule(**expected)
        self.expected = expected
        self.secure = secure._replace(port=expected.get("https_port", secure.port))
        self.trust = trust
        self.trusting = tls_context(trust)
        self.seconds = seconds
        self.deadline = time.monotonic() + TARGET_TIME_OUTS * seconds
        self.addresses: List[Address] = []
        self.hops: List[Hop] = []
        # By the id of the finding: URL, address ("": all), and the values in the sentence.
        self.seen: Dict[str, List[Tuple[str, str, Dict[str, Any]]]] = {}

    def found(self, id: str, url: object, address: str = "", **values: Any) -> None:
        """Note what was seen at a URL."""
        self.seen.setdefault(id, []).append((str(url)[:2000], address, values))

    def is_over(self) -> bool:
        """Return whether the time of the target is up; then not everything was asked."""
        over = time.monotonic() >= self.deadline
        if over:
            seconds = f"{TARGET_TIME_OUTS * self.seconds:g}"
            self.found("cut-short", self.plain.name, seconds=seconds)
        return over

    def request_deadline(self) -> float:
        """Return the deadline of a request that begins now."""
        return min(time.monotonic() + self.seconds, self.deadline)

    def finding(self, id: str, is_ignored: bool) -> Finding:
        """Make one finding of all that was seen under this id."""
        urls, where, values = zip(*self.seen[id])
        urls = list(dict.fromkeys(urls))
        url = urls[0][:300]
        if len(urls) > 1:
            url += f" (and {len(urls) - 1} more)"
        text = text_of(id, url=url, **values[0])
        addresses = sorted(set(where) - {""})
        if addresses and len(addresses) < len(self.addresses):
            text += f" [at {', '.join(addresses)}]"
        return Finding(id, "ignored" if is_ignored else SEVERITY_OF[id], text, urls)


class Visit:
    """The questions to one address of a site."""

    def __init__(self, site: Site, address: Address) -> None:
        self.site = site
        self.address = address
        self.answers: Dict[Tuple[Url, str], Optional[Response]] = {}
        self.https: Dict[str, bool] = {}  # by origin: whether it speaks TLS with us
        self.silent: Dict[str, Exception] = {}  # by origin: its time-out
        self.guarded: Set[str] = set()  # the origins that want a client certificate
        self.asked = ""  # the address that was asked last: other names have others

    def found(self, id: str, url: object, **values: Any) -> None:
        """Note what was seen at this address."""
        self.site.found(id, url, self.address[0], **values)

    # What goes over the wire.

    def connect(self, url: Url, context: Optional[ssl.SSLContext] = None) -> Any:
        """Return a socket to the server of url; OSError if there is none in time.

        With a context it speaks TLS, from its first byte or its do_handshake() on.
        """
        if url.origin() in self.silent:
            raise self.silent[url.origin()]
        deadline = self.site.request_deadline()
        if url.name != self.site.plain.name:
            places = look_up(url.name, url.port, 0, deadline - time.monotonic())
        elif url.origin() == self.site.plain.origin():
            places = [self.address]
        else:
            places = [(self.address[0], url.port)]
        # An address that hangs must leave time for the next one.
        share = max(deadline - time.monotonic(), 0.001) / len(places)
        for place in places:
            self.asked = place[0]
            try:
                sock = socket.create_connection(place, share)
                break
            except OSError:
                if place == places[-1]:
                    raise
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        if context is None:
            return sock
        name = url.name.strip("[]")
        return context.wrap_socket(sock, server_hostname=name, do_handshake_on_connect=False)

    def shake_hands(self, url: Url, context: ssl.SSLContext) -> Handshake:
        """Try a handshake.  A certificate that is refused is a result; other faults are OSError."""
        with self.connect(url, context) as tls:
            try:
                tls.do_handshake()
            except ssl.SSLError as error:
                if "VERIFY_FAILED" not in str(error):
                    raise
                return Handshake(refused=cause_of(error, self.site.seconds))
            certificate = tls.getpeercert(True)
            return Handshake(certificate, tls.getpeercert() or {}, tls.cipher()[0])

    def judge_dates(self, origin: str, fields: Dict[str, Any]) -> bool:
        """Judge when a certificate begins and ends; return whether it is valid now."""
        begin = ssl.cert_time_to_seconds(fields["notBefore"])
        end = ssl.cert_time_to_seconds(fields["notAfter"])
        now = time.time()
        if now < begin:
            self.found("redirection-invalid-cert.not-yet-valid", origin, date=fields["notBefore"])
        elif now > end:
            self.found("redirection-invalid-cert.expired", origin, date=fields["notAfter"])
        # A certificate for six days is always in its last 14 days (RFC 9773 renews at two thirds).
        elif end - now < min(14 * DAY, (end - begin) / 3):
            days = int((end - now) / DAY)
            self.found("cert-expires-soon", origin, date=fields["notAfter"], days=days)
        return begin <= now <= end

    def judge_certificate(self, url: Url, certificate: bytes) -> None:
        """Find out whether a certificate is trusted: each handshake asks one question."""
        origin = url.origin()
        trusted = self.shake_hands(url, self.site.trusting)
        fields = trusted.fields
        if not fields:
            # With itself as its authority, at any time: what does it say?
            itself = {"cadata": ssl.DER_cert_to_PEM_cert(certificate)}
            fields = self.shake_hands(url, tls_context(itself, X509_NO_CHECK_TIME)).fields
        is_in_date = not fields or self.judge_dates(origin, fields)
        if fields and not is_named(fields, url.name):
            self.found("redirection-invalid-cert.name", origin, host=url.name)
        if not is_in_date:
            # Whatever its own dates: does it lead to an authority?
            trusted = self.shake_hands(url, tls_context(self.site.trust, X509_NO_CHECK_TIME))
        if trusted.fields:
            return
        if not self.site.trust and not has_authorities(self.site.trusting):
            id = "no-authorities"
        elif fields and fields["issuer"] == fields["subject"]:
            id = "redirection-invalid-cert.self-signed"
        else:
            id = "redirection-invalid-cert.chain"
        self.found(id, origin, why=trusted.refused)

    def judge_tls(self, url: Url) -> None:
        """Shake hands as a browser would; OSError or ValueError: there is no HTTPS."""
        strict = tls_context(None)
        strict.options &= ~OP_LEGACY_SERVER_CONNECT
        try:
            first = self.shake_hands(url, strict)
        except ssl.SSLError as error:
            if "legacy" not in str(error).lower():
                raise
            # Browsers accept that.  Python shows it only by this error.
            self.found("tls-old", url.origin(), what="no secure renegotiation, RFC 5746")
            first = self.shake_hands(url, tls_context(None))
        if not MODERN_CIPHER.match(first.cipher):
            self.found("tls-old", url.origin(), what=f"TLS 1.2 with {first.cipher}")
        self.judge_certificate(url, first.certificate)

    def speaks_tls(self, url: Url) -> bool:
        """Return whether the origin of url speaks TLS; its certificate is looked at once."""
        origin = url.origin()
        if origin not in self.https:
            try:
                self.judge_tls(url)
                self.https[origin] = True
            except (OSError, ValueError) as error:  # ValueError: invalid dates
                id = self.failed("domain.tls.cannot_connect", url, error)
                self.https[origin] = id == "client-certificate-wanted"
        return self.https[origin]

    # One question.

    def fetch(self, url: Url, cookies: str = "", host: str = "") -> Response:
        """GET url.  OSError: there is no answer; ValueError: the answer is not HTTP/1."""
        cookie_line = f"Cookie: {cookies}\r\n" if cookies else ""
        # It carries no credentials.  Some servers redirect only clients that send
        # Upgrade-Insecure-Requests, as all browsers do (W3C Upgrade Insecure Requests,
        # section 3.2).
        request = (
            f"GET {url.target} HTTP/1.1\r\n"
            f"Host: {host or url.authority()}\r\n"
            f"User-Agent: owahttps/{__version__}\r\n"
            "Accept: text/html,*/*;q=0.8\r\n"
            "Upgrade-Insecure-Requests: 1\r\n"
            f"{cookie_line}Connection: close\r\n"
            "\r\n"
        )

        def is_enough(data: bytes) -> bool:
            """Only some pages are read beyond their head."""
            answer = final_response(data)
            if answer is None:
                return False
            unread = url.scheme == "https" and answer.status not in (400, 421)
            return unread or answer.complete or is_redirect(answer)

        deadline = self.site.request_deadline()
        with self.connect(url, tls_context(None) if url.scheme == "https" else None) as sock:
            data, error = converse(sock, request.encode("latin-1"), deadline, is_enough, MAX_ANSWER)
        if isinstance(error, TIME_OUT):
            self.silent[url.origin()] = error
        response = final_response(data)
        if not response and not error and url.scheme == "http" and len(data) < MAX_ANSWER:
            # It was closed.  For browsers that ends a head too, but not over https.
            response = final_response(data.rstrip() + b"\r\n\r\n")
        if response:
            return response
        if data and not isinstance(error, TIME_OUT):
            raise ValueError("not HTTP/1")
        raise error or ConnectionError("closed without an answer")

    def tls_fault(self, url: Url, error: Exception) -> str:
        """Return the id of the finding that an error over https means, or ""."""
        if url.origin() in self.guarded:
            return "client-certificate-wanted"
        for id, pattern in TLS_FAULTS.items():
            if re.search(pattern, str(error)):
                return id
        # A server that wants a certificate refuses the handshake in TLS 1.2, and what follows it
        # in TLS 1.3.  There the alert is lost if our request has crossed it: then the connection
        # is reset.  So it is asked again, without a request.
        if self.https.get(url.origin()) or CLIENT_CERTIFICATE_ALERT.search(str(error)):
            with contextlib.suppress(OSError), self.connect(url, tls_context(None)) as tls:
                deadline = min(time.monotonic() + 2, self.site.request_deadline())
                _, refusal = converse(tls, b"", deadline)  # most servers stay silent
                # A server that shares no cipher with us sends alert 40 too, but then there is
                # no cipher yet.
                if tls.cipher() and CLIENT_CERTIFICATE_ALERT.search(str(refusal)):
                    self.guarded.add(url.origin())
                    return "client-certificate-wanted"
        return ""

    def failed(self, id: str, url: Url, error: Exception) -> str:
        """Note what an error means, and return that finding; `id` if it is nothing special."""
        if isinstance(error, TIME_OUT):
            self.silent[url.origin()] = error
        if self.site.is_over():
            return ""
        if has_no_way(error):
            id = "address-unreachable"
        elif url.scheme == "https":
            id = self.tls_fault(url, error) or id
        place = url if id == "http-no-answer" else url.origin()
        self.found(id, place, why=cause_of(error, self.site.seconds))
        return id

    def add_hop(self, url: Url, response: Optional[Response], start: float) -> None:
        """Note a request that began at start, or a connection that was not accepted."""
        milliseconds = int(1000 * (time.monotonic() - start))
        status = response.status if response else 0
        location = log_escape((response and response.field("location")) or "", 2000)
        self.site.hops.append(Hop(str(url)[:2000], status, location, milliseconds, self.asked))

    def ask(self, url: Url, cookies: str = "") -> Optional[Response]:
        """Return the answer to url, asked for once; None, and a finding, if there is none."""
        # The four chains mostly end on the same pages.
        key = url, cookies
        if key in self.answers or url.origin() in self.silent:
            return self.answers.get(key)
        if self.site.is_over():
            return None
        response = None
        self.asked = ""
        start = time.monotonic()
        if url.scheme == "http" or self.speaks_tls(url):
            try:
                response = self.fetch(url, cookies)
            except OSError as error:
                self.failed("http-no-answer", url, error)
            except ValueError:
                self.found("http-garbled", url)
        self.add_hop(url, response, start)
        self.answers[key] = response
        if response:
            self.judge_fields(url, response)
        return response

    # What the answers mean.

    def judge_fields(self, url: Url, response: Response) -> None:
        """Judge cookies and Strict-Transport-Security, of every answer."""
        policies = set(response.values("strict-transport-security"))
        set_now = [cookie for cookie in read_cookies(response, url) if not cookie.deleted]
        if url.scheme == "http":
            if set_now:
                self.found("cookie-over-http", url)
            if policies:
                self.found("redirects.http.useless_header", url)
            return
        if not all(cookie.secure for cookie in set_now):
            self.found("cookie-without-secure", url)
        if len(policies) > 1:
            self.found("response.multiple_headers", url)

    def judge_hsts(self) -> None:
        """Judge what a browser knows of the site's name after all answers over https."""
        name = self.site.plain.name
        if is_address(name.strip("[]")):  # RFC 6797 section 8.3: an address cannot have it
            return
        own: List[Tuple[Url, Optional[Hsts]]] = []
        parent = ""
        for (url, _), response in self.answers.items():
            if response and url.scheme == "https":
                # RFC 6797 section 8.1: only the first field counts.
                hsts = read_hsts(response.field("strict-transport-security") or "")
                if url.name == name:
                    own.append((url, hsts))
                elif hsts and hsts.covers_subdomains and name.endswith("." + url.name):
                    parent = url.name
        known = any(hsts for _, hsts in own)
        for url, hsts in own:
            age = hsts.max_age if hsts else 0
            if hsts and age < 180 * DAY:  # as MDN and testssl.sh count it
                id = "hsts-implemented-max-age-less-than-six-months"
            elif hsts and age < 365 * DAY:
                id = "header.preloadable.max_age.below_1_year"
            elif known:
                continue
            else:
                id = "hsts-from-parent" if parent else "response.no_header"
            self.found(id, url, age=age, parent=parent)

    def next_url(self, url: Url, response: Response) -> Optional[Url]:
        """Return where a browser goes from this answer; None where it stays."""
        locations = list(dict.fromkeys(response.values("location")))
        if not is_redirect(response):
            refresh = refresh_of(response, url)
            if not refresh:
                return None
            locations = [refresh]
        location = ", ".join(locations) or "none"
        following = None
        # Browsers refuse several that differ: a header may have been injected.
        if len(locations) == 1 and locations[0]:
            with contextlib.suppress(ValueError):
                following = resolve(location, url)
        if following is None:
            self.found("location-invalid", url, status=response.status, location=location)
            return None
        if not URI_TEXT.fullmatch(location) or NOT_FOR_ALL_CLIENTS.match(location):
            self.found("location-not-a-uri", url, location=location)
        return following

    def judge_first(self, url: Url, response: Response, following: Url) -> None:
        """Judge the first hop: it is the one that the rule is about."""
        rule, expected = self.site.rule, self.site.expected
        wanted = following._replace(name=rule.host or following.name)
        if "path" in expected or rule.keep_path:
            wanted = resolve(rule.location(url.name, url.target), url)
        wanted = wanted._replace(port=expected.get("https_port", following.port))
        status = expected.get("status", response.status)
        if expected and not is_redirect(response):
            status = rule.status
        if following.scheme != "https":
            id = "redirection-not-to-https-on-initial-redirection"
        elif following.port == url.port != rule.https_port and not self.speaks_tls(following):
            id = "location-keeps-plain-port"
        elif (wanted, status) != (following, response.status):
            id = "rule-mismatch"
        elif not is_redirect(response):
            id = "redirection-by-refresh"
        elif following.name not in (rule.host, url.name):
            id = "redirection-off-host-from-http"
        else:
            id = "redirection-to-https"
        right = f"{status} {wanted}"
        self.found(id, url, status=response.status, location=following, expected=right)
        # RFC 6797 section 7.2; an expected status is left as it is.
        if response.status in (302, 303, 307) and "status" not in expected:
            self.found("redirection-temporary", url, status=response.status)

    def judge_last(self, start: Url, url: Url, response: Response) -> None:
        """Judge where a visitor ends."""
        if is_redirect(response):  # it leads nowhere, as next_url() has said
            return
        place, id = start, "redirection-not-to-https"
        if url.scheme == "https":
            place, id = url, secure_fault(response)
        elif url == start:
            id = plain_fault(response)
        if id:
            self.found(id, place, status=response.status, location=url)

    # All questions.

    def follow(self, start: Url) -> None:
        """Ask for start, go where it leads, and judge every hop."""
        url = start
        # There are sites that set a cookie and redirect to themselves until it comes back.
        jar: Dict[Tuple[str, str, str], Cookie] = {}
        visited: List[Tuple[Url, str]] = []
        for redirects in range(MAX_HOPS):
            kept = [one for one in jar.values() if one.goes_to(url)]
            cookies = "; ".join(one.pair for one in kept)
            if (url, cookies) in visited:
                break
            visited.append((url, cookies))
            if redirects == 4:
                self.found("redirects.too_many", start)
            response = self.ask(url, cookies)
            if response is None:
                return
            for cookie in read_cookies(response, url):
                if url.scheme == "https" or not cookie.secure:
                    jar[cookie.pair.partition("=")[0], cookie.domain, cookie.path] = cookie
            following = self.next_url(url, response)
            if following is None:
                self.judge_last(start, url, response)
                return
            if redirects == 0 and url.scheme == "http":
                self.judge_first(url, response, following)
            elif url.scheme == "https" and following.scheme == "http":
                when = "subsequent" if redirects else "initial"
                self.found(f"redirects.insecure.{when}", url, location=following)
            url = following
        self.found("redirect-loop", start)

    def try_acme(self) -> None:
        """Certificate authorities follow a redirect, but want the same path."""
        url = self.site.plain._replace(target=ACME_QUESTION)
        response = self.ask(url)
        following = self.next_url(url, response) if response else None
        if following and following.target != url.target:
            self.found("acme-challenge-lost", url, location=following)

    def try_forged_host(self) -> None:
        """An invalid Host (RFC 9110 section 7.2) must not become the host of a Location."""
        root = self.site.plain._replace(target="/")
        with contextlib.suppress(OSError, ValueError):
            response = self.fetch(root, host=f"{root.name}@{FORGED_HOST}")
            if resolve(response.field("location") or "", root).name == FORGED_HOST:
                self.found("host-reflected", root)

    def visit_plain(self) -> None:
        """Ask the plain port."""
        plain, path = self.site.plain, self.site.rule.path
        for target in dict.fromkeys(["/", plain.target, path, path.rstrip("/") + DEEP_LINK]):
            self.follow(plain._replace(target=target))
        root = self.ask(plain._replace(target="/"))
        if root and is_redirect(root):
            self.try_acme()
            self.try_forged_host()

    def knock(self, url: Url) -> Optional[OSError]:
        """Return why a port takes no connection, or None."""
        start = time.monotonic()
        try:
            self.connect(url).close()
        except OSError as error:
            self.add_hop(url, None, start)
            if isinstance(error, TIME_OUT):
                self.silent[url.origin()] = error
            return error
        return None

    def run(self) -> Optional[OSError]:
        """Ask everything.  Return the error if this address takes no connection at all."""
        plain, secure = self.site.plain, self.site.secure
        error = self.knock(plain)
        if error is None:
            self.visit_plain()
        elif has_no_way(error):
            return error
        else:
            secure_error = self.knock(secure)
            if secure_error:
                return error if isinstance(error, ConnectionError) else secure_error
            meant = self.speaks_tls(secure) and not self.site.expected
            id = "redirects.http.does_not_exist" if meant else "http-no-answer"
            self.found(id, plain, why=cause_of(error, self.site.seconds))
            self.follow(secure)
        self.judge_hsts()
        return None


def judge_dead(site: Site, host: str, error: OSError, alive: List[str]) -> None:
    """Judge an address where neither port can be reached.

    Browsers go on with the other family (RFC 8305).  If one family does not answer and the other
    does, this machine may have no route to it.
    """
    secure, why = site.secure.origin(), cause_of(error, site.seconds)
    family = [one for one in alive if (":" in one) == (":" in host)]
    refused = isinstance(error, ConnectionError)
    if has_no_way(error) or (alive and not family and not refused):
        site.found("address-unreachable", host, why=why)
    else:
        site.found("nothing-answers", site.plain.origin(), host, secure=secure, why=why)


def visit_all(site: Site, connect: str, family: int) -> None:
    """Visit all addresses of a site, or of the host to connect to."""
    name, port = split_authority(ascii_authority(connect or site.plain.authority()))
    try:
        site.addresses = look_up(name, port or PORTS["http"], family, site.seconds)
    except OSError as error:
        options: Dict[int, str] = {socket.AF_INET: " with -4", socket.AF_INET6: " with -6"}
        option, why = options.get(family, ""), cause_of(error, site.seconds)
        site.found("host-unknown", name, option=option, why=why)
        return
    failures: Dict[str, Optional[OSError]] = {}
    for address in site.addresses:
        failures[address[0]] = Visit(site, address).run()
        if site.is_over():
            break
    alive = [host for host, failure in failures.items() if not failure]
    for host, failure in failures.items():
        if failure:
            judge_dead(site, host, failure, alive)


def check_ignored(ids: Sequence[str]) -> None:
    """Raise ValueError unless these are ids of findings."""
    if isinstance(ids, str):
        raise ValueError(f"ignore={ids!a} is one string: give a list of ids")
    for id in ids:
        if id not in SEVERITY_OF:
            raise ValueError(f"there is no finding {id!a} to ignore: see check --list")


def check(
    target: str,
    expected: Optional[Dict[str, Any]] = None,
    connect: str = "",
    family: int = 0,
    trust: Optional[Trust] = None,
    seconds: float = 10.0,
    ignore: Sequence[str] = (),
) -> Report:
    """Find out whether plain HTTP at target is redirected as it should be.

    target    what people paste: a host, host:port, host/path, or an http or https URL
    expected  fields of RedirectRule that must hold; of the others, what the site does is right
    connect   "host:port" to ask instead, for the same name; its port is the one of plain HTTP
    family    socket.AF_INET or AF_INET6; 0 is both, and the worst of all addresses counts
    trust     cafile, capath or cadata, as for ssl.SSLContext.load_verify_locations();
              none: this machine's authorities
    seconds   for each request; a target takes at most six times as long
    ignore    ids of FINDINGS that do not count

    Raises RuleError for an invalid rule, ValueError for an invalid `connect` or `ignore`, and
    OSError for a trust that cannot be read; never for the target or for what a server does.
    """
    check_ignored(ignore)
    try:
        plain, secure = read_target(target)
    except ValueError as error:  # one invalid target does not stop the others
        text = text_of("target-invalid", error=error)
        return Report(target, "unknown", [], [Finding("target-invalid", "unknown", text, [])])
    site = Site(plain, secure, expected or {}, trust or {}, seconds)
    visit_all(site, connect, family)
    findings = [site.finding(id, id in ignore) for id in site.seen]
    findings.sort(key=lambda finding: -SEVERITIES.index(finding.severity))
    severity = findings[0].severity if findings[0].severity in EXIT_CODES else "ok"
    return Report(target, severity, site.hops, findings)


# ======== Command line ================================================================


class Once(argparse.Action):
    """An option that may be given once: a second --host would replace the first in silence."""

    def __call__(self, _: Any, namespace: Any, values: Any, option: Any = None) -> None:
        if hasattr(namespace, self.dest):
            raise RuleError(f"{option} is given twice; each further name is an --allow-host")
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, like all others here."""

    def error(self, message: str) -> Any:
        raise RuleError(f"{message} ({self.prog} --help lists what there is)")


def number_between(low: float, high: float) -> Callable[[str], Any]:
    """Return a type for argparse: a number from low to high, an int if low is one."""
    kind = type(low)
    pattern = "[0-9]{1,10}" if kind is int else r"[0-9]{1,10}(\.[0-9]+)?"

    def convert(text: str) -> Any:
        if re.fullmatch(pattern, text) and low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text!a} is not a number from {low} to {high}")

    return convert


def add_rule_arguments(
    parser: Any,
    leave_out: Sequence[str] = (),
    enforced: bool = True,
    default_path: str = RedirectRule().path,
) -> None:
    """Add the options of a RedirectRule, except those of `leave_out`.

    One that is not given is not in the namespace, so that its default stands only in
    RedirectRule.  Where the rule is not enforced, an option that is not given accepts anything.
    """
    group = parser.add_argument_group("the rule")

    def add(option: str, text: str, default: object = None, **settings: Any) -> None:
        if option not in leave_out:
            if default and enforced:
                text += f" (default: {default})"
            group.add_argument(option, default=argparse.SUPPRESS, help=text, **settings)

    port, default = number_between(1, 65535), RedirectRule()
    add("--path", "where every request leads", default_path)
    add("--keep-path", "keep the path and query of the request instead", action="store_true")
    add("--host", "lead to this name instead of the requested one", metavar="NAME", action=Once)
    add("--https-port", "lead to this port", default.https_port, type=port, metavar="PORT")
    add("--status", "301, 302, 307 or 308", default.status, type=int, metavar="CODE")
    text = "redirect only this name; may be repeated"
    add("--allow-host", text, action="append", metavar="NAME", dest="allow_hosts")
    text = "answer 403 at and below this path; may be repeated"
    add("--api", text, action="append", metavar="PATH")
    add("--acme-dir", "serve token files of ACME http-01 from this folder", metavar="DIR")
    add("--health", "answer 200 at this path, for health checks", metavar="PATH")


def rule_fields(args: argparse.Namespace) -> Dict[str, Any]:
    """Return the fields of RedirectRule that the command line names."""
    return {name: value for name, value in vars(args).items() if name in RedirectRule._fields}


def rule_of(fields: Dict[str, Any], port: int) -> RedirectRule:
    """Return the rule with these fields, for plain HTTP at this port."""
    rule = RedirectRule(**fields)
    if rule.keep_path and "path" in fields:
        raise RuleError(f"--path {rule.path} and --keep-path: give only one of them")
    if rule.https_port == port:
        raise RuleError(f"--https-port {port} is the port of plain HTTP: that would be a loop")
    return rule


def say(text: str) -> None:
    """Tell the user something that is not a result."""
    with contextlib.suppress(OSError):  # the exit code says it too
        print(f"owahttps: {text}", file=sys.stderr, flush=True)


COLOURS = {
    # check
    "ok": 32,
    "note": 36,
    "warning": 33,
    "unknown": 35,
    "critical": 31,
    # selftest
    "unsafe": 31,
    "MUST": 31,
    "differs": 33,
}


def print_verdict(word: str, text: str) -> None:
    """Print a line that begins with a verdict, coloured for a person (https://no-color.org)."""
    padded = word.ljust(8)
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        padded = padded.replace(word, f"\033[{COLOURS.get(word, 0)}m{word}\033[m")
    print(f"{padded}  {text}")


def bind_trouble(error: OSError, host: str, port: int) -> str:
    """Return why a listener cannot bind, and what to do about it."""
    where = f"port {port} on {host or 'every address'}"
    if sys.platform == "win32" and error.errno in (errno.EADDRINUSE, errno.EACCES):
        return (
            f"{where} is in use: netstat -ano shows by which process; "
            "PID 4 is http.sys (IIS), see netsh http show servicestate"
        )
    if error.errno == errno.EADDRINUSE:
        return f"{where} is in use: ss -ltnp 'sport = :{port}' shows by which process"
    if error.errno == errno.EACCES:
        return (
            f"not allowed to bind {where}: start with sudo and --user nobody, or by the unit of "
            "owahttps.py generate systemd (it has CAP_NET_BIND_SERVICE), or set "
            "sysctl net.ipv4.ip_unprivileged_port_start=80"
        )
    return (
        f"cannot bind {where}: {error.strerror or error}; --bind takes an address of this machine"
    )


# ---- serve ----


def add_serve_arguments(parser: Any) -> None:
    add = parser.add_argument
    count = number_between(1, 10**6)
    add("--bind", default="", metavar="ADDR", help="listen on this address (default: all)")
    text = "listen on this port; 0 is a free one (default: 80)"
    add("-p", "--port", type=number_between(0, 65535), default=80, help=text)
    add("--user", metavar="NAME", help="become this user once the port is bound")
    text = (
        "connections at once (default: %(default)s, "
        f"at most the limit of open files minus {SPARE_FILES})"
    )
    add("--max-connections", type=count, default=MAX_CONNECTIONS, metavar="N", help=text)
    add("--quiet", action="store_true", help="write no access log")
    add_rule_arguments(parser)


def connection_cap(wanted: int) -> int:
    """Return how many connections may be open: as many as wanted, if file descriptors suffice."""
    try:
        import resource
    except ImportError:
        return min(wanted, 500)  # select() on Windows takes 512 sockets
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if soft < 0:  # no limit
        return wanted
    return min(wanted, max(8, soft - SPARE_FILES))


def become(user: str) -> None:
    """Become this user, for good."""
    try:
        import pwd

        entry = pwd.getpwnam(user)
        os.initgroups(user, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    except (ImportError, KeyError):
        raise OSError(f"there is no user {user!a} here") from None
    except OSError as error:
        raise OSError(f"cannot become user {user!a}: {error.strerror}; that takes root") from None


def on_signal(stop: Callable[[], Any]) -> None:
    """Call stop() on the first signal that asks for an end."""

    def handle(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one would kill the interpreter's exit
        stop()

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):  # the last is Windows' Ctrl-Break
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handle)


def warnings_for(rule: RedirectRule, host: str) -> Iterator[str]:
    """Yield warnings of what may go wrong later."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        yield "running as root; --user NAME drops that once the port is bound"
    if rule.status in PERMANENT:
        if host == "::1" or host.startswith("127."):
            yield f"browsers keep a {rule.status} for a day, for localhost too, but not a 302"
        if not rule.host and not rule.allow_hosts:
            yield (
                f"a permanent redirect ({rule.status}) for every name: "
                "browsers keep it; --host or --allow-host limits it to yours"
            )
    if rule.https_port != 443 and not rule.acme_dir:
        yield "Let's Encrypt follows redirects only to ports 80 and 443: see --acme-dir"


def open_server(args: argparse.Namespace, rule: RedirectRule) -> RedirectServer:
    """Return the server, with its port bound."""
    host = "" if args.bind == "*" else args.bind.strip("[]")
    try:
        cap = connection_cap(args.max_connections)
        return RedirectServer((host, args.port), rule=rule, max_connections=cap)
    except UnicodeError:  # from the IDNA codec
        raise RuleError(f"--bind {args.bind!a} is not an address of this machine") from None
    except OSError as error:
        raise OSError(bind_trouble(error, host, args.port)) from None


def start_lines(server: RedirectServer, rule: RedirectRule) -> Iterator[str]:
    """Yield what is told at the start."""
    name = f"[{server.server_name}]" if ":" in server.server_name else server.server_name
    address = f"{name}:{server.server_port}"
    target = rule.authority("HOST") + ("/..., path kept" if rule.keep_path else rule.path)
    yield f"listening on {address}; http://HOST/ goes to https://{target} ({rule.status})"
    for warning in warnings_for(rule, server.server_name):
        yield f"warning: {warning}"


def command_serve(args: argparse.Namespace) -> int:
    """Redirect until a signal."""
    rule = rule_of(rule_fields(args), args.port)
    if rule.acme_dir and not os.path.isdir(rule.acme_dir):
        raise RuleError(f"--acme-dir {rule.acme_dir!a} is not a folder: make it first")
    # A socket must not get the number of a standard file that is closed: the log would go there.
    while os.open(os.devnull, os.O_RDWR) < 2:
        pass
    with open_server(args, rule) as server:
        server.error_log = errors = Log(2, tell=lambda _: None)

        def tell(text: str) -> None:
            errors.write(f"owahttps: {text}\n")

        log = Log(1, tell)  # while we may still open the terminal
        server.access_log = None if args.quiet else log
        if args.user:
            become(args.user)
        if rule.acme_dir and not os.access(rule.acme_dir, os.R_OK | os.X_OK):
            by = f" by user {args.user}" if args.user else ""
            raise OSError(f"--acme-dir {rule.acme_dir!a} cannot be read{by}")
        on_signal(server.stop)
        for line in start_lines(server, rule):
            tell(line)
        server.serve_forever()
        log.close()
        errors.close()
    return 0


# ---- generate ----


def add_generate_arguments(parser: Any) -> None:
    add = parser.add_argument
    text = "one of those that --list shows (default: exchange2000)"
    add("recipe", nargs="?", default="exchange2000", metavar="RECIPE", help=text)
    add("--list", action="store_true", help="list the recipes")
    add("--part", help="only this part, such as asp, steps or script")
    add("--write", metavar="DIR", help="write the files and the steps into this folder")
    text = "the port of plain HTTP (default: 80)"
    add("-p", "--port", type=number_between(1, 65535), default=80, help=text)
    add_rule_arguments(parser, default_path="/exchange; exchange: /owa; iis keeps the path")


def recipe_rule(args: argparse.Namespace) -> RedirectRule:
    """Return the rule, whose path is what the recipe is for, if none is given."""
    fields = rule_fields(args)
    if "path" not in fields and "keep_path" not in fields:
        if args.recipe == "exchange":
            fields["path"] = "/owa"  # since Exchange 2007
        if args.recipe == "iis":
            fields["keep_path"] = True
    return rule_of(fields, args.port)


def choose_part(recipe: str, parts: List[Part], wanted: str) -> Part:
    """Return the part with this name, or with this file."""
    for part in parts:
        if wanted in (part.name, part.file):
            return part
    names = ", ".join(part.name for part in parts)
    raise RuleError(f"{recipe} has no part {wanted!a}; it has {names}")


def with_headings(parts: List[Part]) -> str:
    """Return several parts as one text."""
    return "\n".join(f"---- {part.file or part.name} ----\n{part.text}" for part in parts)


def print_parts(parts: List[Part]) -> None:
    """Print one part as it is, or several with their names."""
    if len(parts) > 1:
        print(with_headings(parts), end="")
        return
    text = parts[0].text
    if parts[0].file.endswith(".cmd") and os.linesep == "\n" and not sys.stdout.isatty():
        # Redirected into a file that goes to Windows: cmd.exe loses labels after lone LFs.
        text = text.replace("\n", "\r\n")
    print(text, end="")


def read_file(path: str) -> bytes:
    """Return what is in a file."""
    with open(path, "rb") as file:
        return file.read()


def write_parts(folder: str, parts: List[Part]) -> None:
    """Write the parts into files: all, or none if one exists with other content."""
    if not os.path.isdir(folder):
        raise OSError(f"--write {folder!a} is not a folder: make it first")
    texts = {part.file: part.text for part in parts if part.file}
    steps = [part for part in parts if not part.file]
    if steps:
        texts["owahttps-steps.txt"] = with_headings(steps)
    missing = {}
    for name, text in texts.items():
        path = os.path.join(folder, name)
        newline = "\r\n" if name.endswith((".asp", ".cmd", ".txt")) else "\n"
        data = text.replace("\n", newline).encode("ascii")
        if not os.path.lexists(path):
            missing[path] = data
        elif not (os.path.isfile(path) and read_file(path) == data):
            raise OSError(f"{path} exists with other content: nothing was written")
    written = []
    try:
        for path, data in missing.items():
            with open(path, "xb") as file:
                written.append(path)
                file.write(data)
    except OSError:  # a full disk, say: all or none
        for path in written:
            with contextlib.suppress(OSError):
                os.remove(path)
        raise
    for name in texts:
        print(name)  # without the folder, whose name a code page may lack


def next_step(recipe: str, folder: str, part: str) -> str:
    """Return what to do with the files that were written."""
    if recipe in SERVERS:
        server = SERVERS[recipe]
        if os.path.abspath(folder) == os.path.dirname(server.place):
            return server.then
        return f"copy it to {server.place}, then: {server.then}"
    if part:
        return f"the whole recipe says where it goes: owahttps.py generate {recipe}"
    return "owahttps-steps.txt says what to do with them on the server"


def command_generate(args: argparse.Namespace) -> int:
    """Print a recipe, or write it."""
    if args.list:
        for name, what in RECIPES.items():
            print(f"{name:<14}{what}")
        return 0
    args.recipe = args.recipe.lower()
    if args.recipe not in RECIPES:
        raise RuleError(f"there is no recipe {args.recipe!a}: see generate --list")
    parts = recipe_parts(args.recipe, recipe_rule(args), args.port)
    if args.part:
        parts = [choose_part(args.recipe, parts, args.part)]
    if args.write:
        write_parts(args.write, parts)
        say("next: " + next_step(args.recipe, args.write, args.part))
    else:
        print_parts(parts)
    return 0


# ---- selftest ----


def add_selftest_arguments(parser: Any) -> None:
    add = parser.add_argument
    add("--against", metavar="URL", help="send the cases to this redirect server")
    add("-k", default="", metavar="WORD", dest="word", help="only cases with this in id or text")
    add("--list", action="store_true", help="print the cases, and send nothing")
    add("--json", action="store_true", help="print one object a case")
    add("--quiet", action="store_true", help="print only failures and the count")
    add_rule_arguments(parser)


def address_of(url: str) -> Address:
    """Return the host and port of an http URL, or of "host[:port]"."""
    scheme, slashes, rest = url.partition("://")
    if slashes and scheme.lower() != "http":
        raise RuleError(f"--against {url!a} is not an http URL: the cases go to plain HTTP")
    authority = (rest if slashes else url).rstrip("/")
    if not authority:
        raise RuleError(f"--against {url!a} names no host")
    if "/" in authority:
        raise RuleError(f"--against takes no path: {url!a}")
    name, port = split_authority(authority)
    return name.strip("[]"), port or 80


def print_results(results: List[Result], quiet: bool) -> None:
    """Print the failures, the worst first, then what has passed, then how many there are."""
    verdicts = {SAFE: "unsafe", MUST: "MUST", OWN: "differs"}
    counts = {}
    for level, verdict in verdicts.items():
        failures = [one for one in results if one.level == level and not one.passed]
        counts[level] = len(failures)
        for one in failures:
            print_verdict(
                verdict,
                f"{one.id}: {log_escape(one.what, 80)} ({one.reference}): "
                f"expected {log_escape(one.expected, 200)}, got {log_escape(one.got, 200)}",
            )
    for one in results:
        if one.passed and not quiet:
            print_verdict("ok", f"{one.id}: {log_escape(one.what, 80)}")
    noun = "case" if len(results) == 1 else "cases"
    print(
        f"{len(results)} {noun}: {counts[SAFE]} unsafe, {counts[MUST]} against a MUST, "
        f"{counts[OWN]} otherwise than decided"
    )


def try_against(url: str, rule: RedirectRule, word: str) -> List[Result]:
    """Return the results at another server; OSError where it does not serve this rule.

    Otherwise nearly every case would fail, and say nothing, or wait for a silent server.
    """
    address = address_of(url)
    plain = next(case for case in cases(rule) if case.id == "get")
    first = try_case(address, plain, 3)
    if not first.passed:
        raise OSError(
            f"{url}: a plain GET got {log_escape(first.got, 200)}, and this rule wants "
            f"{plain.right[0]}: start that server, or correct the rule options"
        )
    return try_cases(address, rule, word)


def list_cases(rules: List[RedirectRule], word: str) -> int:
    """Print the cases for these rules, each once."""
    for id, case in {case.id: case for rule in rules for case in cases(rule, word)}.items():
        print(f"{case.level}  {id}: {log_escape(case.what, 80)} ({case.reference})")
    return 0


def command_selftest(args: argparse.Namespace) -> int:
    fields = rule_fields(args)
    if fields and not (args.against or args.list):
        raise RuleError("the rule options describe the server that --against names")
    rule = rule_of(fields, address_of(args.against)[1] if args.against else 0)
    if args.list:
        return list_cases([rule] if fields or args.against else own_rules("DIR"), args.word)
    word = args.word
    results = try_against(args.against, rule, word) if args.against else try_ourselves(word)
    if not results:
        raise RuleError(f"-k {args.word!a} is in no case's id or text")
    if args.json:
        for result in results:
            print(json.dumps(result._asdict()))
    else:
        print_results(results, args.quiet)
    grave = (SAFE, MUST) if args.against else (SAFE, MUST, OWN)
    return 1 if any(one.level in grave and not one.passed for one in results) else 0


# ---- check ----


def add_check_arguments(parser: Any) -> None:
    add = parser.add_argument
    add("target", nargs="*", metavar="TARGET", help="a host, host:port, host/path, or a URL")
    add("--list", action="store_true", help="list the ids of all findings")
    text = "leave the finding with this id out of the verdict; may be repeated"
    add("--ignore", action="append", default=[], metavar="ID", help=text)
    add("--ca-file", metavar="FILE", help="trust these authorities, not the system's")
    add("--connect", default="", metavar="HOST:PORT", help="ask there, for the same name")
    add("-4", dest="ipv4", action="store_true", help="ask only IPv4 addresses")
    add("-6", dest="ipv6", action="store_true", help="ask only IPv6 addresses")
    text = "for each request; a target takes at most six times as long (default: 10)"
    add("--timeout", type=number_between(0.1, 9999.0), default=10.0, metavar="SECONDS", help=text)
    add("--json", action="store_true", help="print one JSON object for each target")
    add("--quiet", action="store_true", help="print only warnings and worse")
    leave_out = ("--allow-host", "--api", "--acme-dir", "--health")
    add_rule_arguments(parser, leave_out, enforced=False)


def print_folded(indent: int, word: str, text: str) -> None:
    """Print a verdict and a text that is folded at a terminal's width; elsewhere in one line."""
    if sys.stdout.isatty():
        hanging = indent + 10
        width = max(shutil.get_terminal_size().columns - 1 - hanging, 20)
        text = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
        text = text.replace("\n", "\n" + " " * hanging)
    print(" " * indent, end="")
    print_verdict(word, text)


def shown_target(target: str) -> str:
    """Return a target for the screen: as it was typed, and if not ASCII, as DNS has it."""
    shown = log_escape(target, 300)
    if target.isprintable() and any(character > "~" for character in target):
        encoding = sys.stdout.encoding or "utf-8"
        typed = target.encode(encoding, "backslashreplace").decode(encoding)
        with contextlib.suppress(ValueError):
            shown = f"{typed} ({read_target(target)[0].name})"
    return shown.replace("|", "\\x7C")  # as in text_of()


def check_all(targets: List[str], *settings: Any) -> Iterator[Report]:
    """Yield the report of each target, in their order, each as soon as it is there."""
    from concurrent.futures import ThreadPoolExecutor  # `serve` has no use for it

    # If the reader of our output has gone, map() does not begin the others.
    with ThreadPoolExecutor(16) as pool:
        yield from pool.map(lambda target: check(target, *settings), targets)


def print_hops(hops: List[Hop]) -> None:
    """Print the requests; an endless redirect has too many of them."""
    several = len({hop.address for hop in hops}) > 1
    for hop in hops[:MAX_PRINTED_HOPS]:
        arrow = f" -> {hop.location}" if hop.location else ""
        where = f"  [{hop.address}]" if several and hop.address else ""
        print(f"  {hop.milliseconds:4} ms  {hop.status or '-':>3}  {hop.url}{arrow}{where}")
    if len(hops) > MAX_PRINTED_HOPS:
        print(f"  and {len(hops) - MAX_PRINTED_HOPS} more requests, which --json has")


def print_report(report: Report) -> None:
    """Print a report for a person.  Its first line is enough for a pager."""
    print_folded(0, report.severity, f"{shown_target(report.target)}: {report.headline()}")
    print_hops(report.hops)
    for finding in report.findings:
        print_folded(2, finding.severity, f"{finding.id}  {finding.text}")


def print_alarms(report: Report) -> None:
    """Print only warnings and worse: one line each, with its target."""
    target = shown_target(report.target)
    for finding in report.findings:
        if finding.severity in ALARMS:
            print_folded(0, finding.severity, f"{target}: {finding.id}  {finding.text}")


def report_as_json(report: Report) -> str:
    """Return a report as one line of JSON."""
    hops = [hop._asdict() for hop in report.hops]
    findings = [finding._asdict() for finding in report.findings]
    return json.dumps(dict(report._asdict(), hops=hops, findings=findings))


def list_findings() -> int:
    """Print the id, the severity and the sentence of each kind of finding."""
    for severity, group in FINDINGS.items():
        for id, sentence in group.items():
            print_folded(0, severity, f"{id}  {sentence.replace('{', '<').replace('}', '>')}")
    return 0


def command_check(args: argparse.Namespace) -> int:
    if args.list:
        return list_findings()
    if not args.target:
        raise RuleError("no TARGET: give a host, or --list")
    check_ignored(args.ignore)
    trust = {"cafile": args.ca_file} if args.ca_file else {}
    try:
        tls_context(trust)
    except OSError as error:
        raise RuleError(f"--ca-file {args.ca_file!a}: {pem_trouble(error)}") from None
    fields = rule_fields(args)
    rule_of(fields, 0)
    if args.connect:
        try:
            split_authority(ascii_authority(args.connect))
        except ValueError as error:
            raise RuleError(f"--connect: {error}") from None
    family = 0
    if args.ipv4 != args.ipv6:
        family = socket.AF_INET if args.ipv4 else socket.AF_INET6
    settings = (fields, args.connect, family, trust, args.timeout, args.ignore)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # else Ctrl-C would wait for all threads
    worst = "ok"
    for report in check_all(args.target, *settings):
        if args.json:
            print(report_as_json(report))
        elif args.quiet:
            print_alarms(report)
        else:
            print_report(report)
        sys.stdout.flush()
        worst = max(worst, report.severity, key=SEVERITIES.index)
    return EXIT_CODES[worst]


# ---- demo ----


def add_demo_arguments(parser: Any) -> None:
    add = parser.add_argument
    port = number_between(0, 65535)
    text = "port of plain HTTP, or the next free one (default: 8080)"
    add("-p", "--port", type=port, default=8080, help=text)
    text = "port of HTTPS, or the next free one (default: 8443)"
    add("--https-port", type=port, default=8443, metavar="PORT", dest="stub_port", help=text)
    add("--open", action="store_true", help="open the browser")
    add("--before", action="store_true", help="answer plain HTTP as IIS does before the fix")
    add("--cert", default="", metavar="FILE", help="a certificate for the stub")
    add("--key", default="", metavar="FILE", help="its key, if in another file")
    leave_out = ("--host", "--https-port", "--allow-host", "--acme-dir", "--health")
    add_rule_arguments(parser, leave_out)


def next_free(port: int, server: Callable[..., Any], *settings: Any, **fields: Any) -> Any:
    """Return this server on loopback, at the first port from this one on that is free."""
    for candidate in range(port, min(port + 100, 65536)):
        try:
            return server(("127.0.0.1", candidate), *settings, **fields)
        except OSError as error:
            trouble = OSError(bind_trouble(error, "127.0.0.1", candidate))
            taken = error.errno == errno.EADDRINUSE
            if not (taken or (sys.platform == "win32" and error.errno == errno.EACCES)):
                break
    raise trouble


def plain_server(args: argparse.Namespace, rule: RedirectRule, demo: Demo) -> Any:
    """Return the server of a demo's port 80: the redirect, or IIS before the fix."""
    if args.before:
        server = next_free(args.port, ThreadingServer, BeforeHandler)
        server.secure_url = rule.location("localhost", "/")
        server.tell = lambda line: print(f"http   {line}", flush=True)
    else:
        server = next_free(args.port, RedirectServer, DemoHandler, rule=rule)
        server.on_answer = demo.tell_plain
    return server


def command_demo(args: argparse.Namespace) -> int:
    """Show the redirect until a signal."""
    if args.key and not args.cert:
        raise RuleError(f"--key {args.key!a} belongs to a --cert, and there is none")
    rule = rule_of(rule_fields(args), 0)
    over = threading.Event()
    on_signal(over.set)
    demo = Demo()
    stub = next_free(args.stub_port, StubServer, args.cert, args.key, demo.story, demo.tell_secure)
    with running(stub) as (_, https_port):
        rule = rule._replace(https_port=https_port)
        server = plain_server(args, rule, demo)
        demo.port = server.server_port
        url = f"http://localhost:{demo.port}"
        with running(server):
            if args.before:
                outcome = "answers 403.4, as IIS does before the fix"
            else:
                outcome = f"leads to {rule.location('localhost', '/')}"
            print(f"{url}/ {outcome}", flush=True)
            if not args.cert:
                trust = f'--cacert "{sys.argv[0]}"' if os.path.isfile(sys.argv[0]) else "-k"
                say(f"browsers warn of the certificate; curl -iL {trust} {url}/")
            say("Ctrl-C ends it")
            if args.open:
                import webbrowser

                if not webbrowser.open(f"{url}/"):
                    say(f"no browser found: open {url}/ in yours")
            while not over.wait(0.5):  # Windows lets no Ctrl-C through a wait without an end
                pass
    return 0


# ---- all commands ----

# Each command: its arguments, what it does, what it is for, and the end of its --help.
COMMANDS = {
    "serve": (
        add_serve_arguments,
        command_serve,
        "redirect plain HTTP to HTTPS, until stopped by a signal",
        """\
The access log goes to standard output, in Combined Log Format, and everything
else to standard error.  SIGTERM, SIGINT and SIGHUP stop it.

examples:
  sudo owahttps.py serve --user nobody --host mail.example.com >> access.log
  owahttps.py serve --port 8080 --keep-path --status 308
""",
    ),
    "generate": (
        add_generate_arguments,
        command_generate,
        "print the configuration for another server",
        """\
examples:
  owahttps.py generate                        the article: page and IIS steps
  owahttps.py generate --part asp --write .   only the page, as a file
  owahttps.py generate exchange --host mail.example.com --write .
  owahttps.py generate nginx --keep-path --status 308
""",
    ),
    "selftest": (
        add_selftest_arguments,
        command_selftest,
        "prove the redirect, end to end and case by case",
        """\
Exit 1: a case has failed; with --against, one of the levels safe and must, or
the server's answer to a plain GET is not the one of this rule.

examples:
  owahttps.py selftest
  owahttps.py selftest --against http://127.0.0.1:8080 --keep-path
""",
    ),
    "check": (
        add_check_arguments,
        command_check,
        "check that port 80 of these sites redirects correctly",
        """\
Exit 0: ok, 1: warning, 2: critical, 3: could not tell, or wrong usage.

examples:
  owahttps.py check mail.example.com
  owahttps.py check --path /owa --connect 192.0.2.7:80 mail.example.com
""",
    ),
    "demo": (
        add_demo_arguments,
        command_demo,
        "show the redirect in a browser, only on this machine",
        """\
examples:
  owahttps.py demo --open
  owahttps.py demo --before           the problem instead: 403.4
""",
    ),
}
READER_GONE = (errno.EPIPE, errno.EINVAL) if sys.platform == "win32" else (errno.EPIPE,)


def build_parser() -> Parser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="owahttps.py", description=__doc__, formatter_class=layout)
    parser.add_argument("-V", "--version", action="version", version=f"owahttps {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    commands.required = True
    for name, (add_arguments, run, what, end) in COMMANDS.items():
        text = f"{what[0].upper()}{what[1:]}."
        command = commands.add_parser(
            name, help=what, description=text, epilog=end, formatter_class=layout
        )
        add_arguments(command)
        command.set_defaults(run=run, parser=command)
    return parser


def open_standard_files() -> None:
    """Replace a standard file that is closed, which Python shows as None."""
    for name in ("stderr", "stdout"):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_WRONLY)
            setattr(sys, name, os.fdopen(null, "w", closefd=False))
            if name == "stdout":
                say("standard output is closed: nobody will see what goes there")


def parse(argv: List[str]) -> argparse.Namespace:
    """Return the arguments of a command; RuleError for wrong usage."""
    if argv[:1] == ["help"]:
        argv = argv[1:2] + ["--help"]
    if any(word == "" or (word.startswith("--") and word.endswith("=")) for word in argv):
        raise RuleError("an argument is empty: is a variable not set?")
    args, unknown = build_parser().parse_known_args(argv or ["--help"])
    if unknown:
        args.parser.error(f"unknown arguments: {' '.join(unknown)}")
    return args


def main(argv: Optional[List[str]] = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    open_standard_files()
    # 1 and 2 are verdicts of a check.
    wrong_usage, failed = (3, 3) if argv[:1] == ["check"] else (2, 1)
    try:
        args = parse(argv)
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except ValueError as error:  # RuleError, or an invalid --ignore
        say(f"error: {error}")
        return wrong_usage
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.errno not in READER_GONE:
            where = f": {error.filename}" if error.filename else ""
            say(f"error: {error.strerror or error}{where}")
        try:
            sys.stdout.flush()
        except OSError:  # what is left would fail again when the interpreter ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
