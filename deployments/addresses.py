"""Which network addresses a URL given by a user may lead to: public unicast ones and no others.

`ipaddress.is_global` is not the rule: in the Python versions that we support it calls multicast, translated
(NAT64), tunnelled (6to4, Teredo) and documentation addresses global. For IPv4 there is a list of what is
refused, from IANA's special-purpose registry; for IPv6 only global unicast is allowed, less what IANA's
special-purpose registry takes out of it.
"""

import ipaddress
import re

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_NOT_PUBLIC_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier-grade NAT; also metadata services of some clouds
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's platform service, on a public address
        "169.254.0.0/16",  # link-local; metadata services
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarking
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
_GLOBAL_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments: Teredo, ORCHID, benchmarking
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: carries any IPv4 address inside
        "3fff::/20",  # documentation
    )
)
_NEVER = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "100.100.100.200/32",  # Alibaba's metadata service
        "168.63.129.16/32",
        "169.254.0.0/16",
        "192.0.0.192/32",  # Oracle's metadata service
        "224.0.0.0/4",
        "240.0.0.0/4",
        "::/128",
        "fd00:ec2::254/128",  # Amazon's metadata service
        "fe80::/10",
        "ff00::/8",
    )
)

_DOTTED_QUAD = re.compile(r"(?:(?:0|[1-9][0-9]{0,2})\.){3}(?:0|[1-9][0-9]{0,2})")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")


def unmapped(address: IPAddress) -> IPAddress:
    """The address that a connection really goes to: the IPv4 address behind `::ffff:a.b.c.d`."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def is_public(address: IPAddress) -> bool:
    """True for addresses that anyone on the internet reaches as well as we do."""
    address = unmapped(address)
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_V4)
    if address.scope_id is not None or address not in _GLOBAL_UNICAST_V6:
        return False
    return not any(address in network for network in _NOT_PUBLIC_V6)


def is_never_allowed(address: IPAddress) -> bool:
    """True for what even an allow-listed name may not lead to: metadata services, link-local, multicast."""
    address = unmapped(address)
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
        return True
    return any(address.version == network.version and address in network for network in _NEVER)


def literal_address(host: str) -> IPAddress | None:
    """The address that `host` spells, None where it is a name.

    As in the URL Standard, a host whose last label is a number is an IPv4 address. Raises ValueError for the
    spellings that resolvers understand and people don't: `2130706433`, `0x7f.1`, `0177.0.0.1`, `127.1`.
    """
    if ":" in host:
        return ipaddress.IPv6Address(host)
    labels = host.removesuffix(".").split(".")
    if not _NUMBER.fullmatch(labels[-1]):
        return None
    if not _DOTTED_QUAD.fullmatch(host):
        raise ValueError("not a canonical IPv4 address")
    return ipaddress.IPv4Address(host)
