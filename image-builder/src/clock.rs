//! Times in images: now, or what `SOURCE_DATE_EPOCH` says (reproducible-builds.org).

use std::time::{SystemTime, UNIX_EPOCH};

use oci::layer::Timestamp;

use crate::error::Error;
use crate::plan::BuildArgs;

/// The variable, and the build argument, that says which time it is.
pub(crate) const EPOCH: &str = "SOURCE_DATE_EPOCH";

/// The time that goes into images.
pub(crate) fn now() -> Result<Timestamp, Error> {
    Ok(epoch(&BuildArgs::default())?.unwrap_or_else(system))
}

/// What `SOURCE_DATE_EPOCH` says, as a build argument or, where there is none, in the environment.
pub(crate) fn epoch(args: &BuildArgs) -> Result<Option<Timestamp>, Error> {
    let text = match args.0.get(EPOCH) {
        Some(given) => given.clone(),
        None => match std::env::var(EPOCH) {
            Ok(text) => text,
            Err(_) => return Ok(None),
        },
    };
    match text.parse::<u32>() {
        Ok(seconds) => Ok(Some(Timestamp { seconds: seconds.into(), nanoseconds: 0 })),
        Err(_) => Err(Error::Invalid {
            what: format!("{EPOCH}={text:?}"),
            reason: "expected seconds since 1970".to_owned(),
        }),
    }
}

/// The time of this machine.
pub(crate) fn system() -> Timestamp {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(elapsed.as_secs()).unwrap_or_default(),
        nanoseconds: elapsed.subsec_nanos(),
    }
}

/// RFC 3339 in UTC, to the millisecond.
pub(crate) fn rfc3339_millis(time: Timestamp) -> String {
    let text = rfc3339(time);
    format!("{}.{:03}Z", text.trim_end_matches('Z'), time.nanoseconds / 1_000_000)
}

/// RFC 3339 in UTC, to the second. (Days to a date: Howard Hinnant's `civil_from_days`.)
pub(crate) fn rfc3339(time: Timestamp) -> String {
    let (days, seconds) = (time.seconds.div_euclid(86_400), time.seconds.rem_euclid(86_400));
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 { month_index + 3 } else { month_index - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_700_000_000, "2023-11-14T22:13:20Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(Timestamp { seconds, nanoseconds: 0 }), text);
        }
        let time = Timestamp { seconds: 1, nanoseconds: 7_900_000 };
        assert_eq!(rfc3339_millis(time), "1970-01-01T00:00:01.007Z");
    }
}
