import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.addresses import is_never_allowed, is_public, literal_address

# Svix's and Smokescreen's test vectors, and what they leave out
PUBLIC = (
    "1.1.1.1",
    "8.8.8.8",
    "100.63.255.255",
    "100.128.0.0",
    "172.32.0.1",
    "223.255.255.255",
    "2001:4860:4860::8888",
    "2001:200::1",
    "::ffff:8.8.8.8",
    "2606:4700:4700::1111",
)
NOT_PUBLIC = (
    "0.0.0.0",  # noqa: S104
    "0.1.2.3",
    "10.254.0.0",
    "100.64.0.1",
    "100.100.0.0",
    "100.100.100.200",
    "127.0.0.1",
    "127.254.254.254",
    "168.63.129.16",
    "169.254.45.1",
    "169.254.169.254",
    "172.16.10.65",
    "172.31.255.255",
    "192.0.0.0",
    "192.0.0.9",
    "192.0.0.255",
    "192.0.2.255",
    "192.88.99.3",
    "192.168.10.65",
    "198.18.0.0",
    "198.19.255.255",
    "198.51.100.65",
    "203.0.113.6",
    "224.1.2.3",
    "233.252.0.16",
    "239.255.255.255",
    "240.240.240.240",
    "255.255.255.255",
    "::",
    "::1",
    "::10.0.0.1",
    "::127.0.0.1",
    "::ffff:0.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::808:808",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b::c0a8:0",
    "64:ff9b:1::dead:beef",
    "100::1:2:3:4",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2001:10::1",
    "2001:20::1",
    "2001:db8::1",
    "2002:c000:0204::dead:beef",
    "2002:c0a8:0001::dead:beef",
    "3fff::dead:beef",
    "5f00::dead:beef",
    "fd00:ec2::254",
    "fd7a:115c:a1e0::1",
    "fdee:3A45:9057::0001",
    "fe80::1%eth0",
    "fe80::dead:beef",
    "febf:ffff::dead:beef",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
)


@pytest.mark.parametrize("text", PUBLIC)
def test_public_address_is_public(text: str) -> None:
    assert is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", NOT_PUBLIC)
def test_special_address_is_not_public(text: str) -> None:
    assert not is_public(ipaddress.ip_address(text))


@given(st.ip_addresses(v=4))
def test_mapped_address_is_judged_by_the_address_inside(address: ipaddress.IPv4Address) -> None:
    assert is_public(ipaddress.IPv6Address(f"::ffff:{address}")) == is_public(address)


@given(st.ip_addresses())
def test_what_is_never_allowed_is_not_public(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    assert not (is_never_allowed(address) and is_public(address))


@pytest.mark.parametrize("text", ["169.254.169.254", "fd00:ec2::254", "100.100.100.200", "::ffff:169.254.169.254"])
def test_metadata_service_is_never_allowed(text: str) -> None:
    assert is_never_allowed(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", ["127.0.0.1", "10.1.2.3", "fd00::1", "8.8.8.8"])
def test_ordinary_address_may_be_allow_listed(text: str) -> None:
    assert not is_never_allowed(ipaddress.ip_address(text))


@pytest.mark.parametrize("host", ["example.com", "1.2.3.4.com", "a", "7f000001", "x0x7f", "1-2"])
def test_name_is_not_an_address(host: str) -> None:
    assert literal_address(host) is None


@pytest.mark.parametrize("host", ["8.8.8.8", "0.0.0.1", "255.255.255.255", "::1", "2001:4860::1"])
def test_canonical_address_is_read(host: str) -> None:
    assert literal_address(host) == ipaddress.ip_address(host)


@pytest.mark.parametrize(
    "host",
    [
        "2130706433",
        "127.1",
        "127.0.1",
        "0177.0.0.1",
        "0x7f.0.0.1",
        "0x7f000001",
        "0X7F.1",
        "127.0.0.01",
        "127.0.0.1.",
        "1.2.3.256",
        "1.2.3.4.5",
        "127.0.0.0x1",
        "example.0x",
        "00000000177.1",
    ],
)
def test_rare_notation_of_an_address_is_refused(host: str) -> None:
    with pytest.raises(ValueError):
        literal_address(host)
