//! `strftime_now`, which some templates call to tell the model the day.
use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// The time now in UTC by a `strftime` format: `%Y %y %m %d %e %j %b %B %a %A %H %I %M %S %p %%`, and `%-` for no
/// padding.
///
/// # Errors
/// The code that is not known.
pub fn now(format: &str) -> Result<String, String> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    at(seconds, format)
}

fn at(seconds: u64, format: &str) -> Result<String, String> {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day, day_of_year) = civil(days);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let name = MONTHS[month as usize - 1];
    let weekday = DAYS[(days % 7) as usize];
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut code = rest.next();
        let bare = code == Some('-');
        if bare {
            code = rest.next();
        }
        let number = |out: &mut String, value: u64, width: usize| {
            let width = if bare { 0 } else { width };
            // Writing to a String cannot fail.
            let _ = write!(out, "{value:0width$}");
        };
        match code {
            Some('Y') => number(&mut out, year, 4),
            Some('y') => number(&mut out, year % 100, 2),
            Some('m') => number(&mut out, month, 2),
            Some('d') => number(&mut out, day, 2),
            Some('e') => out += &format!("{day:2}"),
            Some('j') => number(&mut out, day_of_year, 3),
            Some('B') => out += name,
            Some('b') => out += &name[..3],
            Some('A') => out += weekday,
            Some('a') => out += &weekday[..3],
            Some('H') => number(&mut out, hour, 2),
            Some('I') => number(&mut out, (hour + 11) % 12 + 1, 2),
            Some('M') => number(&mut out, minute, 2),
            Some('S') => number(&mut out, second % 60, 2),
            Some('p') => out += if hour < 12 { "AM" } else { "PM" },
            Some('%') => out.push('%'),
            other => return Err(format!("strftime_now: {format:?} has `%{}`", other.map_or("".into(), String::from))),
        }
    }
    Ok(out)
}

/// Year, month, day of the month and of the year for a day since 1970-01-01.
fn civil(mut days: u64) -> (u64, u64, u64, u64) {
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let day_of_year = days + 1;
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    (year, month as u64 + 1, days + 1, day_of_year)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Expected values: Python's `datetime.fromtimestamp(t, UTC).strftime`.
    #[test]
    fn dates_are_pythons() {
        let all = "%Y-%m-%d %H:%M:%S %I%p %a %A %b %B %j %y %%";
        for (seconds, expected) in [
            (0, "1970-01-01 00:00:00 12AM Thu Thursday Jan January 001 70 %"),
            (951_868_799, "2000-02-29 23:59:59 11PM Tue Tuesday Feb February 060 00 %"),
            (1_704_067_199, "2023-12-31 23:59:59 11PM Sun Sunday Dec December 365 23 %"),
            (4_107_542_400, "2100-03-01 00:00:00 12AM Mon Monday Mar March 060 00 %"),
        ] {
            assert_eq!(at(seconds, all).unwrap(), expected);
        }
        assert_eq!(at(0, "%-d %e").unwrap(), "1  1");
        assert!(at(0, "%Q").unwrap_err().contains("%Q"));
        assert!(at(0, "%").is_err());
    }
}
