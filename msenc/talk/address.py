"""Where the page is served: who can reach it, and by which names."""

import ipaddress
import re
import socket


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address.

    Example:
        >>> [is_loopback(host) for host in ("127.0.0.1", "localhost", "0.0.0.0", "")]
        [True, True, False, False]
    """
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)} if host else set()
        return bool(found) and all(ipaddress.ip_address(address).is_loopback for address in found)
    except (OSError, ValueError):  # UnicodeError is a ValueError
        return False


class Address:
    """The address that is served.

    Args:
        host: as `RespondConfig` has it.
    """

    def __init__(self, host: str) -> None:
        self.is_local = is_loopback(host)
        own = () if self.is_local else (socket.gethostname(), socket.getfqdn())
        self.names = {name.lower().rstrip(".") for name in ("localhost", host, *own)}

    def is_named(self, header: str) -> bool:
        """Whether a Host header names this machine: a foreign name that leads here is an attack (DNS rebinding).

        Example:
            >>> address = Address("127.0.0.1")
            >>> [address.is_named(host) for host in ("localhost:7860", "[::1]:80", "evil.example:7860", "10.0.0.1", "")]
            [True, True, False, False, False]
        """
        name = re.sub(r":\d*$", "", header) if not header.endswith("]") else header
        name = name.removeprefix("[").removesuffix("]").lower().rstrip(".")
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self.names
        return address.is_loopback or not self.is_local
