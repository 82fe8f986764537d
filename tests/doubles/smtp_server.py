"""A mail server on loopback that takes mail as a provider's submission port does: after TLS and a login, not before.

It answers in the order and by the codes of RFC 5321, 3207 and 4954.
"""

import base64
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from threading import Thread
from typing import cast

NEEDED = ("From", "To", "Subject", "Date", "Message-ID")


@dataclass
class MailServer:
    """What it took, and how it behaves."""

    login: tuple[str, str] = ("", "")
    offers_tls: bool = True
    drops_after_data: bool = False
    """Whether it hangs up once it has the mail, without a word."""
    port: int = 0
    taken: list[EmailMessage] = field(default_factory=list)
    connections: int = 0


@contextmanager
def mailing(server: MailServer, certificate: Path, key: Path) -> Iterator[None]:
    """The server, with its port, while it runs."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    class Session(StreamRequestHandler):
        def handle(self) -> None:
            server.connections += 1
            greeted = secure = known = False
            receiver = ""
            self.say("220 mail.example ESMTP")
            while line := self.rfile.readline().decode().strip():
                verb, _, rest = line.partition(" ")
                match verb.upper():
                    case "EHLO":
                        greeted = True
                        offered = ["AUTH PLAIN"] if secure else ["STARTTLS"] * server.offers_tls
                        names = ["mail.example", *offered, "8BITMIME"]
                        self.wfile.write("".join(f"250-{name}\r\n" for name in names).encode())
                        self.say("250 SIZE 10000000")
                    case "STARTTLS" if greeted and server.offers_tls:
                        self.say("220 go ahead")
                        self.request = context.wrap_socket(self.request, server_side=True)
                        self.setup()
                        greeted, secure = False, True
                    case "AUTH" if not secure:
                        self.say("538 5.7.11 encryption needed")
                    case "AUTH":
                        _, user, password = base64.b64decode(rest.split()[1]).decode().split("\0")
                        known = (user, password) == server.login
                        self.say("235 2.7.0 yes" if known else "535 5.7.8 bad credentials")
                    case "MAIL" if not (greeted and secure and known):
                        self.say("530 5.7.0 authentication needed")
                    case "MAIL":
                        self.say("250 ok")
                    case "RCPT":
                        receiver = rest if rest.lower().startswith("to:<") and "@example.org>" in rest else ""
                        self.say("250 ok" if receiver else "550 5.7.1 no relaying")
                    case "DATA" if not receiver:
                        self.say("503 5.5.1 RCPT first")
                    case "DATA":
                        self.say("354 go on")
                        body = b""
                        while (piece := self.rfile.readline()) != b".\r\n":
                            body += piece.removeprefix(b".")
                        mail = cast(EmailMessage, message_from_bytes(body, policy=policy.default))
                        if any(mail[name] is None for name in NEEDED):
                            self.say("550 5.6.0 a header is missing")
                            continue
                        server.taken.append(mail)
                        if server.drops_after_data:
                            return
                        self.say("250 queued")
                    case "QUIT":
                        self.say("221 bye")
                        return
                    case _:
                        self.say("503 5.5.1 not now")

        def finish(self) -> None:
            super().finish()
            self.request.close()

        def say(self, text: str) -> None:
            self.wfile.write(f"{text}\r\n".encode())

    class Server(ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that does not trust the certificate hangs up."""

    with Server(("127.0.0.1", server.port), Session) as listening:
        server.port = listening.server_address[1]
        Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
        yield
        listening.shutdown()
