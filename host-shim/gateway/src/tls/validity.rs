//! When a certificate ends, read from its DER (RFC 5280, 4.1): this much of X.509 and no more.
//!
//! Whether a certificate is good is for clients to judge; the gateway only says when they will stop to.

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

const INTEGER: u8 = 0x02;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;
/// `[0] EXPLICIT`: the version, which the first one leaves out.
const VERSION: u8 = 0xa0;

/// The time after which the certificate is not valid; `None` for what is no certificate.
pub(super) fn not_after(der: &[u8]) -> Option<Timestamp> {
    let mut certificate = expect(&mut &*der, SEQUENCE)?;
    let mut tbs = expect(&mut certificate, SEQUENCE)?;
    if tbs.first() == Some(&VERSION) {
        value(&mut tbs)?;
    }
    // serialNumber, signature, issuer.
    for tag in [INTEGER, SEQUENCE, SEQUENCE] {
        expect(&mut tbs, tag)?;
    }
    let mut validity = expect(&mut tbs, SEQUENCE)?;
    value(&mut validity)?;
    let (tag, time) = value(&mut validity)?;
    parse_time(tag, time)
}

fn expect<'a>(input: &mut &'a [u8], tag: u8) -> Option<&'a [u8]> {
    value(input).filter(|(found, _)| *found == tag).map(|(_, content)| content)
}

/// The next tag and its content, in DER's definite lengths.
fn value<'a>(input: &mut &'a [u8]) -> Option<(u8, &'a [u8])> {
    let (&tag, rest) = input.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        short @ 0..=0x7f => (usize::from(short), rest),
        // Up to four bytes: no certificate has 4 GiB.
        0x81..=0x84 => {
            let (bytes, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            (bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)), rest)
        }
        _ => return None,
    };
    let (content, rest) = rest.split_at_checked(length)?;
    *input = rest;
    Some((tag, content))
}

/// RFC 5280, 4.1.2.5: always with seconds and in UTC.
fn parse_time(tag: u8, text: &[u8]) -> Option<Timestamp> {
    let digits = text.strip_suffix(b"Z").filter(|digits| digits.iter().all(u8::is_ascii_digit))?;
    let (year, rest) = match (tag, digits.len()) {
        (UTC_TIME, 12) => {
            let year = number(&digits[..2]);
            (if year < 50 { 2000 + year } else { 1900 + year }, &digits[2..])
        }
        (GENERALIZED_TIME, 14) => (number(&digits[..4]), &digits[4..]),
        _ => return None,
    };
    let [month, day, hour, minute, second] =
        std::array::from_fn(|at| number(&rest[2 * at..2 * at + 2]) as i8);
    let time = DateTime::new(year, month, day, hour, minute, second, 0).ok()?;
    Some(time.to_zoned(TimeZone::UTC).ok()?.timestamp())
}

/// Up to four digits.
fn number(digits: &[u8]) -> i16 {
    digits.iter().fold(0, |number, digit| number * 10 + i16::from(digit - b'0'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;

    fn certificate(year: i32) -> Vec<u8> {
        let mut params = CertificateParams::new(["a.example".to_owned()]).unwrap();
        params.not_before = date_time_ymd(1999, 12, 31);
        params.not_after = date_time_ymd(year, 2, 28);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn the_end_is_the_one_that_was_written() {
        // Two digits until 2049, four from 2050 on.
        for year in [2001, 2049, 2050, 4000] {
            let ends = not_after(&certificate(year)).map(|ends| ends.to_string());
            assert_eq!(ends, Some(format!("{year}-02-28T00:00:00Z")));
        }
        assert_eq!(parse_time(UTC_TIME, b"500101000000Z").unwrap().to_string(), "1950-01-01T00:00:00Z");
        for bad in ["20010101000000", "2001010100000Z", "20011301000000Z", "2001+101000000Z", ""] {
            assert_eq!(parse_time(GENERALIZED_TIME, bad.as_bytes()), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_no_certificate_has_no_end_and_does_no_harm(
            at in 0usize..400, byte in any::<u8>(), noise in proptest::collection::vec(any::<u8>(), 0..64),
        ) {
            let mut broken = certificate(2040);
            let length = broken.len();
            broken[at % length] = byte;
            let _ = not_after(&broken);
            let whole = certificate(2040);
            prop_assert_eq!(not_after(&whole[..at % whole.len()]), None);
            let _ = not_after(&noise);
        }
    }
}
