"""`check` against real sockets: each case is a site, and what must be found there.

A site is a plain and a TLS server on free ports of 127.0.0.1,
each with canned bytes for every request; PLAIN and SECURE
in them stand for their ports.  The certificates are made here, by the openssl program.
"""
import contextlib
import errno
import json
import os
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Union

import pytest

import owahttps

SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "owahttps.py")
needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl program")


# ---- Certificates ----------------------------------------------------------------------------------------------------

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
    "authority": ("", OURS, -15000, 999, "authority"), "middle": ("authority", OURS, -99, 99, "authority"),
    "other-authority": ("", OURS, -15000, 999, "authority"), "gone": ("authority", OURS, -99, -9, "authority"),
    "good": ("authority", OURS, -99, 99, "leaf"), "soon": ("authority", OURS, -99, 5, "leaf"),
    "old": ("authority", OURS, -12000, 99, "leaf"), "expired": ("authority", OURS, -99, -9, "leaf"),
    "future": ("authority", OURS, 9, 99, "leaf"), "wrong": ("authority", OTHER, -99, 99, "leaf"),
    "no-ip": ("authority", "DNS:localhost", -99, 99, "leaf"), "expired-wrong": ("authority", OTHER, -99, -9, "leaf"),
    "for-clients": ("authority", OURS, -99, 99, "client"), "stranger": ("other-authority", OURS, -99, 99, "leaf"),
    "old-stranger": ("other-authority", OURS, -12000, 99, "leaf"), "orphan": ("middle", OURS, -99, 99, "leaf"),
    "expired-stranger": ("other-authority", OURS, -99, -9, "leaf"), "expired-middle": ("gone", OURS, -99, 99, "leaf"),
    "self-signed": ("", OURS, -99, 99, "leaf"), "self-signed-wrong": ("", OTHER, -99, 99, "leaf"),
    "self-signed-expired-wrong": ("", OTHER, -99, -9, "leaf"),
}   # type: Dict[str, Any]


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: Any) -> Any:
    """A folder of NAME.pem: key, certificate, and an intermediate one if it is sent; authority.crt is the anchor."""
    folder = tmp_path_factory.mktemp("certificates")
    (folder / "openssl.cnf").write_text(OPENSSL_CA)
    (folder / "index").write_text("")
    (folder / "serial").write_text("01\n")

    def openssl(words: str, san: str = OURS) -> None:
        done = subprocess.run(["openssl"] + words.split(), cwd=str(folder), env=dict(os.environ, SAN=san),
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout

    openssl("ecparam -genkey -name prime256v1 -noout -out key")
    for name, (issuer, san, begin, end, extensions) in CERTIFICATES.items():
        openssl("req -new -config openssl.cnf -key key -subj /CN=%s -out request" % name, san)
        dates = [time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + days * DAY)) for days in (begin, end)]
        openssl(" ".join(["ca -batch -notext -config openssl.cnf -in request -out %s.crt -keyfile key" % name,
                          "-extensions", extensions, "-startdate", dates[0], "-enddate", dates[1],
                          "-cert %s.crt" % issuer if issuer else "-selfsign"]), san)
        sent = [name + ".crt"] + (["gone.crt"] if issuer == "gone" else [])
        (folder / (name + ".pem")).write_text("".join((folder / part).read_text() for part in ["key"] + sent))
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
        self.requests = []      # type: List[bytes]
        self.ports = {}         # type: Dict[bytes, bytes]
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
                threading.Thread(target=self._talk, args=(self.listener.accept()[0],), daemon=True).start()

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
                        answers = self.answer if isinstance(self.answer, dict) else {"": self.answer}
                        answer = answers.get(path.decode("latin-1"), answers[""]).replace(b"PATH", path)
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
IIS5 = says("403 Access Forbidden", "Server: Microsoft-IIS/5.0", "Content-Type: text/html", body="""\
<html dir=ltr><head><title>The page must be viewed over a secure channel</title></head><body>
<h1>The page must be viewed over a secure channel</h1>The page you are trying to view requires the use of "https" in the
address.<p>Please try the following:<ul><li>Try again by typing https:// at the beginning of the address you are
attempting to reach.</ul>
<h2>HTTP 403.4 - Forbidden: SSL required<br>Internet Information Services</h2></body></html>""")
IIS7 = says("403 Forbidden", "Server: Microsoft-IIS/7.5", "Content-Type: text/html; charset=utf-8", body="""\
<html><head><title>IIS 7.5 Detailed Error - 403.4 - Forbidden</title></head><body><h2>HTTP Error 403.4 - Forbidden</h2>
<h3>The page you are trying to access is secured with Secure Sockets Layer (SSL).</h3></body></html>""")


class Case(NamedTuple):
    what: str
    expected: str               # the ids of all findings
    code: int
    plain: Optional[Answer] = GOOD
    secure: Optional[Answer] = HOME
    certificate: str = "good"
    options: str = ""
    target: str = "localhost:PLAIN"


CASES = [
    Case("a right redirect", ALL_GOOD, 0),
    Case("the wrong path, none is expected", ALL_GOOD, 0, to(S + "/elsewhere")),
    Case("the expected path", ALL_GOOD, 0, options="--path /exchange --status 301 --https-port SECURE"),
    Case("path and query kept", ALL_GOOD, 0, to(S + "PATH"), options="--keep-path"),
    Case("path and query expected to be kept", "redirection-to-https rule-mismatch", 2, options="--keep-path"),
    Case("the wrong path", "rule-mismatch", 2, options="--path /owa"),
    Case("the wrong status", "rule-mismatch", 2, options="--status 308"),
    Case("the wrong port", "rule-mismatch", 2, options="--https-port 444"),
    Case("another host, which is the expected one", ALL_GOOD, 0, to("https://127.0.0.1:SECURE/exchange"),
         options="--host 127.0.0.1"),
    Case("not the expected host", "rule-mismatch", 2, options="--host 127.0.0.1"),
    Case("another host", "redirection-off-host-from-http", 1, to("https://127.0.0.1:SECURE/exchange")),
    Case("another host, with the right path", "rule-mismatch", 2, to("https://127.0.0.1:SECURE/exchange"),
         options="--path /exchange"),
    Case("temporary", ALL_GOOD + " redirection-temporary", 0, to(S + "/", status="302 Found")),
    Case("temporary, as expected", ALL_GOOD, 0, to(S + "/", status="302 Found"), options="--status 302"),
    Case("lines end in LF alone, as browsers allow", ALL_GOOD, 0, GOOD.replace(b"\r", b"")),

    Case("IIS 5 answers 403.4", "iis-403.4", 2, IIS5),
    Case("IIS 7 answers 403.4", "iis-403.4", 2, IIS7),
    Case("any 403", "redirection-missing", 2, says("403 Forbidden", body="<h1>Forbidden</h1>")),
    Case("Owahttps.asp on another port", "iis-asp-port-test", 2, says("200 OK", "Server: Microsoft-IIS/5.0")),
    Case("200 in clear", "redirection-missing", 2, HOME.replace(b"Strict", b"No")),
    Case("421 in clear", "redirection-missing", 2, says("421 Misdirected Request")),
    Case("304 is no redirect", "redirection-missing", 2, says("304 Not Modified",
         "Location: https://localhost:SECURE/")),
    Case("plain HTTP and back, for ever", "redirection-to-https redirects.insecure.subsequent redirects.too_many.loop",
         2,
         GOOD, to(P + "/", YEAR)),
    Case("itself, for ever", "redirection-not-to-https-on-initial-redirection redirects.too_many.loop", 2,
         to(P + "PATH")),
    Case("the redirect behind a load balancer that ends TLS", "redirection-to-https redirects.too_many.loop", 2, GOOD,
         to(S + "/exchange", YEAR)),
    Case("the load balancer is told", "proxy-loop redirection-to-https", 2, GOOD, says("421 Misdirected Request",
         YEAR)),
    Case("endless redirects", "redirection-to-https redirects.too_many", 1, GOOD, to(S + "PATHx", YEAR)),
    Case("three hops", ALL_GOOD, 0, to(S + "/2"), {"/2": to(S + "/3", YEAR), "": HOME}),
    Case("four hops", ALL_GOOD + " redirects.too_many", 1, to(S + "/2"),
         {"/2": to(S + "/3", YEAR), "/3": to(S + "/4", YEAR), "/4": to(S + "/5", YEAR), "": HOME}),
    Case("downgrade at hop 2", ALL_GOOD + " redirects.insecure.subsequent", 2, {"/3": to(S + "/4"), "": to(S + "/2")},
         {"/2": to(P + "/3", YEAR), "": HOME}),
    Case("last hop http", "redirection-not-to-https redirection-to-https redirects.insecure.subsequent", 2,
         {"/3": PAGE, "": to(S + "/2")}, to(P + "/3", YEAR)),
    Case("the next hop http, the last https", "redirection-not-to-https-on-initial-redirection", 2,
         {"/2": GOOD, "": to(P + "/2")}),
    Case("the root alone redirects", "redirection-missing redirection-to-https", 2, {"/": GOOD, "": PAGE}),
    Case("the root does not redirect", "redirection-missing redirection-to-https", 2, {"/": PAGE, "": GOOD}),
    Case("the deep link does not redirect", "redirection-missing redirection-to-https", 2,
         {"/exchange/inbox/?cmd=contents&x=a%2Fb": PAGE, "": GOOD}),
    Case("the path of --path does not redirect", "redirection-missing redirection-to-https", 2,
         {"/owa": PAGE, "": to(S + "/owa")}, options="--path /owa"),
    Case("the plain port is kept", "domain.tls.cannot_connect location-keeps-plain-port", 2,
         to("https://localhost:PLAIN/")),
    Case("relative", "redirection-not-to-https-on-initial-redirection redirection-relative redirects.too_many.loop", 2,
         to("/exchange")),
    Case("no scheme", "redirection-not-to-https-on-initial-redirection redirection-relative redirects.too_many.loop",
         2, to("//localhost:PLAIN/exchange")),
    Case("relative over https is right", ALL_GOOD, 0, secure={"/exchange": to("logon.aspx?url=x", YEAR), "": HOME}),
    Case("no Location", INVALID, 2, says("302 Found")),
    Case("no answer over https", "domain.tls.cannot_connect redirection-to-https", 2, secure=None),
    Case("plain HTTP over https", "domain.tls.cannot_connect redirection-to-https", 2, certificate=""),
    Case("only https", "redirection-not-needed-no-http", 0, None, options="--https-port SECURE"),
    Case("nothing at all", "domain.tls.cannot_connect", 2, None, None, options="--https-port SECURE"),
    Case("a redirect to nowhere", "domain.tls.cannot_connect redirection-off-host-from-http", 2,
         to("https://nowhere.invalid/")),
    Case("a name that no DNS has", "host-unknown", 3, target="nowhere.invalid"),
    Case("no IPv6 address", "host-unknown", 3, target="127.0.0.1:PLAIN", options="-6"),
    Case("an IPv4 address", ALL_GOOD, 0, to("https://127.0.0.1:SECURE/"), target="127.0.0.1:PLAIN", options="-4"),

    Case("no HSTS", ALL_GOOD + " response.no_header", 1, secure=says("200 OK")),
    Case("HSTS of a month", ALL_GOOD + " header.preloadable.max_age.too_low", 1,
         secure=HOME.replace(b"31536000", b"2592000; includeSubDomains")),
    Case("HSTS of ten months", ALL_GOOD + " header.preloadable.max_age.below_1_year", 0, secure=HOME.replace(b"315",
         b"265")),
    Case("HSTS with quotes and more", ALL_GOOD, 0, secure=HOME.replace(b"max-age=31536000",
         b'preload; MAX-AGE = "31536000"')),
    Case("HSTS without max-age", ALL_GOOD + " response.no_header", 1, secure=HOME.replace(b"max-age", b"x")),
    Case("HSTS in clear", ALL_GOOD + " redirects.http.useless_header", 1, to(S + "/", YEAR)),
    Case("a cookie in clear", ALL_GOOD + " cookie-over-http", 1, to(S + "/", "Set-Cookie: a=b; Secure")),
    Case("a cookie without Secure", ALL_GOOD + " cookie-without-secure", 1,
         secure=says("200 OK", YEAR, "Set-Cookie: a=b; SECURE", "Set-Cookie: secure=1; HttpOnly")),

    Case("a certificate that begins in the 20th century", ALL_GOOD, 0, certificate="old"),
    Case("expires soon", ALL_GOOD + " cert-expires-soon", 1, certificate="soon"),
    Case("expired", CERT + "expired " + ALL_GOOD, 2, certificate="expired"),
    Case("not yet valid", CERT + "not-yet-valid " + ALL_GOOD, 2, certificate="future"),
    Case("another name", CERT + "name " + ALL_GOOD, 2, certificate="wrong"),
    Case("the name, but asked for by address", CERT + "name " + ALL_GOOD, 2, to("https://127.0.0.1:SECURE/"),
         certificate="no-ip", target="127.0.0.1:PLAIN"),
    Case("expired and another name", CERT + "expired " + CERT + "name " + ALL_GOOD, 2, certificate="expired-wrong"),
    Case("not for servers", CERT + "chain " + ALL_GOOD, 2, certificate="for-clients"),
    Case("an authority that nobody trusts", CERT + "chain " + ALL_GOOD, 2, certificate="stranger"),
    Case("the same, begun in the 20th century", CERT + "chain " + ALL_GOOD, 2, certificate="old-stranger"),
    Case("the same, expired", CERT + "chain " + CERT + "expired " + ALL_GOOD, 2, certificate="expired-stranger"),
    Case("the intermediate certificate is not sent", CERT + "chain " + ALL_GOOD, 2, certificate="orphan"),
    Case("the intermediate certificate expired", CERT + "chain " + ALL_GOOD, 2, certificate="expired-middle"),
    Case("self-signed", CERT + "self-signed " + ALL_GOOD, 2, certificate="self-signed"),
    Case("self-signed, another name", CERT + "name " + CERT + "self-signed " + ALL_GOOD, 2,
         certificate="self-signed-wrong"),
    Case("all at once", CERT + "expired " + CERT + "name " + CERT + "self-signed " + ALL_GOOD, 2,
         certificate="self-signed-expired-wrong"),
]


class Site:
    """The two servers of a case, while its `with` lasts."""

    def __init__(self, case: Case, folder: Any) -> None:
        pem = str(folder / (case.certificate + ".pem")) if case.certificate else ""
        self.plain, self.secure = Canned(), Canned(pem)
        self.plain.ports = self.secure.ports = {name: self.ports(name.decode()).encode() for name in (b"PLAIN",
        b"SECURE")}
        self.servers = [(self.plain, case.plain), (self.secure, case.secure)]
        self.words = ["check", "--ca-file", str(folder / "authority.crt"), "--timeout", "5"] + self.ports(
            case.options + " " + case.target).split()
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


def run(*words: str, **settings: Any) -> Any:
    return subprocess.run([sys.executable, SCRIPT] + list(words), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=20, **settings)


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
        assert list(finding) == ["id", "severity", "text"] and re.fullmatch("[ -~]+", finding["text"])
    assert code == owahttps.EXIT_CODES[report["severity"]]
    assert len(site.requests()) <= 20
    for request in [data for data in site.requests() if data[:1] != b"\x16"]:      # no credential, no body
        assert re.fullmatch(rb"GET /[!-~]* HTTP/1\.1\r\nHost: [!-~]+\r\nUser-Agent: owahttps/[0-9.]+\r\n"
                            rb"Accept: \*/\*\r\nConnection: close\r\n\r\n", request)
    return report, code


@needs_openssl
@pytest.mark.parametrize("case", CASES, ids=[case.what for case in CASES])
def test_finds(case: Case, certificates: Any, capsys: Any) -> None:
    with Site(case, certificates) as site:
        report, code = judge(site, capsys)
        assert (ids(report), code) == (" ".join(sorted(case.expected.split())), case.code), report




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
HOSTILE = [
    Case("endless headers", "http-garbled", 2, endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 999)),
    Case("one endless header", "http-garbled", 2, endless(b"HTTP/1.1 301 Moved\r\nLocation: https://a.b/",
         b"x" * 9999)),
    Case("endless body", "redirection-missing", 2, endless(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 9999)),
    Case("endless status line", "http-garbled", 2, endless(b"HTTP/1.1 200 ", b"x" * 9999)),
    Case("a head that drips", "http-no-answer", 2, drip(b"HTTP/1.1 301 Moved\r\nX: ", b"x"), options=SHORT),
    Case("a body that drips", "redirection-missing", 2, drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x"), options=SHORT),
    Case("a redirect that leaves the connection open", INVALID, 2, drip(b"HTTP/1.1 301 Moved\r\n\r\n", b"")),
    Case("no answer at all", "http-no-answer", 2, stall, options=SHORT),
    Case("closed at once", "http-no-answer", 2, lambda sock, over: None),
    Case("reset", "http-no-answer", 2, reset),
    Case("a head without its end", "http-garbled", 2, b"HTTP/1.1 301 Moved\r\nLocation: https://localhost:SECURE/exch"),
    Case("TLS on the plain port", "http-garbled", 2, b"\x15\x03\x01\x00\x02\x02\x46"),
    Case("SSH", "http-garbled", 2, b"SSH-2.0-OpenSSH\r\n\r\n"),
    Case("a status that is none", "http-garbled", 2, b"HTTP/1.1 9999999999 \x1b[31m\r\n\r\n"),
    Case("HTTP/0.9", "http-garbled", 2, b"<h1>\x1b]0;owned\x07</h1>\r\n\r\n"),
    Case("nothing but line ends", "http-garbled", 2, b"\r\n" * 50),
    Case("HTTP/1.1 over https is garbled", "http-garbled redirection-to-https", 2, secure=b"\x1b[2J\r\n\r\n"),
    Case("no answer over https", "http-no-answer redirection-to-https", 2, secure=stall, options=SHORT),
    Case("no handshake", "domain.tls.cannot_connect redirection-to-https", 2, secure=stall, certificate="",
         options=SHORT),
    Case("HSTS with 5,000 digits", ALL_GOOD, 0, secure=says("200 OK", YEAR + "0" * 5000)),
    Case("HSTS with a sign", ALL_GOOD + " response.no_header", 1,
         secure=says("200 OK", "Strict-Transport-Security: max-age=-31536000")),
    Case("a port with 5,000 digits", INVALID, 2, to("https://localhost:" + "9" * 5000)),
    Case("a name with 60,000 letters", INVALID, 2, to("https://" + "a" * 60000)),
    Case("a name with 60,000 labels", INVALID, 2, to("https://" + "a." * 30000)),
] + [Case("Location %a" % location, INVALID, 2, to(location)) for location in (
    "https://localhost/\x1b[2Jx", "https://localhost/\r", "https://local\rhost/", "https://localhost/\t/",
    "https://localhost/\0",
    "https://localhost/\xff", "https://localhost/\x9b2J", "https://loc\xe4lhost/", "https://localhost/ x", "\x7f", "",
    "https://", "https:///", "https://localhost:0/", "https://localhost:65536/", "https://localhost:x/",
    "https://[::1/",
    "https://user@localhost/", "https://localhost\\@evil.invalid/", "https://[fe80::1%25lo]/", "https://1.2.3/",
    "https://-/",
    "javascript:alert(1)", "ftp://localhost/", "file:///etc/passwd", "mailto:a@b.invalid", "https://{0.__class__}/",
    "https://..")]


@needs_openssl
@pytest.mark.parametrize("case", HOSTILE, ids=[case.what[:40] for case in HOSTILE])
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


@needs_openssl
@pytest.mark.parametrize("location, reflects", [
    ("https://HOST/", True), ("https://localhost/?from=HOST", True), ("https://localhost/", False)])
def test_forged_host(location: str, reflects: bool, certificates: Any, capsys: Any) -> None:
    """A Host that is no host must not come back in Location without a word: caches would keep it for everybody."""
    def script(sock: socket.socket, over: threading.Event) -> None:
        host = re.findall(b"Host: (.*?)\r\n", site.plain.requests[-1])[0].rpartition(b":")[0] or b"x@forged.invalid"
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
            with owahttps.running(owahttps.RedirectServer(("127.0.0.1", 0), rule=rule)) as (_, port):
                code = owahttps.main(["check", "--json", "--ca-file", str(tmp_path / "stub.pem"),
                "127.0.0.1:%d" % port])
                assert (ids(json.loads(capsys.readouterr().out)), code) == (expected, 0)


@needs_openssl
def test_our_listener_behind_a_load_balancer(certificates: Any, capsys: Any) -> None:
    """A load balancer that ends TLS and asks the listener again: a loop must be named, with its cure."""
    def relay(sock: socket.socket, over: threading.Event) -> None:
        with socket.create_connection(address) as there:
            there.sendall(site.secure.requests[-1].replace(b"\r\n\r\n", b"\r\nX-Forwarded-Proto: https\r\n\r\n"))
            sock.sendall(there.recv(9999))
    with Site(Case("", "", 2, None, relay), certificates) as site:
        rule = owahttps.RedirectRule(https_port=site.secure.port, status=301)
        with owahttps.running(owahttps.RedirectServer(("127.0.0.1", 0), rule=rule)) as address:
            site.words[-3:] = ["127.0.0.1:%d" % address[1]]
            report, code = judge(site, capsys)
            assert (ids(report), code) == ("proxy-loop redirection-to-https response.no_header", 2)


def test_demo_before() -> None:
    """The demo answers 403.4, also while a connection that a browser opened ahead says nothing."""
    demo = subprocess.Popen([sys.executable, SCRIPT, "demo", "--before", "--port", "0", "--https-port", "0"],
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True)
    try:
        port = re.findall("[0-9]+", demo.stdout.readline())[0]      # type: ignore
        with socket.create_connection(("127.0.0.1", int(port))):
            done = run("check", "--timeout", "2", "127.0.0.1:" + port)
        assert done.returncode == 2 and done.stderr == ""
        assert "iis-403.4" in done.stdout and "steps 5-10 of Q279681" in done.stdout
    finally:
        demo.terminate()
        demo.communicate()


@needs_openssl
def test_text(certificates: Any) -> None:
    """The whole output, for a person, for cron, and coloured by nobody's wish."""
    with Site(Case("", "", 2, {"/": PAGE, "": GOOD}), certificates) as site:
        done = run(*site.words)
        assert (done.returncode, done.stderr) == (2, "")
        assert re.sub(" +[0-9]+ ms", " N ms", done.stdout) == site.ports("""\
critical  localhost:PLAIN
 N ms  200  http://localhost:PLAIN/
 N ms  301  http://localhost:PLAIN/exchange -> https://localhost:SECURE/exchange
 N ms  200  https://localhost:SECURE/exchange
 N ms  301  http://localhost:PLAIN/exchange/inbox/?cmd=contents&x=a%2Fb -> https://localhost:SECURE/exchange
  critical  redirection-missing  http://localhost:PLAIN/ answers 200 in clear: redirect it to https
  ok        redirection-to-https  http://localhost:PLAIN/exchange goes to https://localhost:SECURE/exchange
""")
        done = run(*(site.words + ["--quiet"]))
        assert (done.returncode, done.stderr, done.stdout) == (2, "", site.ports("""\
critical  localhost:PLAIN
  critical  redirection-missing  http://localhost:PLAIN/ answers 200 in clear: redirect it to https
"""))


@needs_openssl
def test_quiet_says_nothing_of_what_is_good(certificates: Any, capsys: Any) -> None:
    with Site(Case("", "", 0, to(S, status="302 Found")), certificates) as site:
        assert owahttps.main(site.words + ["--quiet"]) == 0
        assert capsys.readouterr() == ("", "")


@needs_openssl
def test_several_targets_in_order(certificates: Any, capsys: Any) -> None:
    """The slow one comes first all the same, and the worst one decides."""
    with Site(Case("", "", 0, stall), certificates) as slow, Site(Case("", "", 0, IIS5), certificates) as fast:
        targets = ["127.0.0.1:%d" % slow.plain.port, "127.0.0.1:%d" % fast.plain.port, "nowhere.invalid"]
        assert owahttps.main(["check", "--json", "--timeout", "0.1"] + targets) == 2
        reports = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [report["target"] for report in reports] == targets
        assert [ids(report) for report in reports] == ["http-no-answer", "iis-403.4", "host-unknown"]


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
            ("iis-403.4", "[at 127.0.0.1]"), ("domain.tls.cannot_connect", "[at 127.0.0.2]")}


@pytest.mark.parametrize("number", [errno.ENETUNREACH, errno.EAFNOSUPPORT])
def test_no_way_to_the_address(number: int, monkeypatch: Any) -> None:
    """A machine without IPv6 must not call a site broken for its AAAA record."""
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(socket, "create_connection", refuse)
    report = owahttps.check("[2001:db8::1]")
    assert [finding.id for finding in report.findings] == ["address-unreachable"] and report.severity == "unknown"


WRONG_USAGE = ["", "--nope localhost", "https://localhost/", "ftp://localhost/", "http://a@b/", "..", "localhost:0",
               "localhost:65536", "localhost \x1b[31m", "b\xfccher.example", "--timeout 0 localhost",
               "--timeout -1 localhost",
               "--timeout nan localhost", "--timeout inf localhost", "--timeout 1e99 localhost", "--path x localhost",
               "--status 303 localhost", "--https-port 0 localhost", "--host a:1 localhost",
               "--ca-file /nowhere localhost",
               "--ca-file /dev/null localhost", "--connect x:y localhost", "--connect https://x localhost"]


@pytest.mark.parametrize("words", WRONG_USAGE)
def test_wrong_usage(words: str, monkeypatch: Any, capsys: Any) -> None:
    """Exit 3 and one line, before anything is asked: no traceback, no escape for the terminal, no half a report."""
    monkeypatch.setattr(owahttps, "check", None)
    try:
        code = owahttps.main(["check"] + words.split())
    except SystemExit as leaving:
        code = leaving.code         # type: ignore
    out, err = capsys.readouterr()
    assert (code, out) == (3, "") and re.fullmatch(r"owahttps[ -~]+\n", err)


@pytest.mark.parametrize("words", ["--nope localhost", "localhost http://", "nowhere.invalid"])
def test_exit_3(words: str) -> None:
    done = run("check", *words.split())
    assert done.returncode == 3 and (done.stdout + done.stderr).count("\n") <= 2 and "Traceback" not in done.stderr
