//! A value of the metadata. Texts and arrays stay where they are in the file.
use super::reader::{Reader, bad};
use crate::error::Result;
use std::fmt;

/// Arrays may hold arrays so many times.
const MAX_DEPTH: u32 = 4;

/// What a key holds.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum Value<'a> {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(&'a [u8]),
    Array(Array<'a>),
}

/// Values of one type, one after the other.
#[derive(Clone, Copy, Debug)]
pub struct Array<'a> {
    kind: Kind,
    len: u64,
    bytes: &'a [u8],
}

/// The type of a value, by the format's numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    const ALL: [Kind; 13] = [
        Kind::U8,
        Kind::I8,
        Kind::U16,
        Kind::I16,
        Kind::U32,
        Kind::I32,
        Kind::F32,
        Kind::Bool,
        Kind::Text,
        Kind::Array,
        Kind::U64,
        Kind::I64,
        Kind::F64,
    ];

    /// The type of that number.
    pub fn of(number: u32) -> Result<Self> {
        let last = Kind::ALL.len() - 1;
        let found = Kind::ALL.get(number as usize).copied();
        found.ok_or_else(|| bad(format!("has a value of type {number}, types go from 0 to {last}")))
    }

    /// Bytes of a value, if all have the same.
    fn size(self) -> Option<u64> {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => Some(1),
            Kind::U16 | Kind::I16 => Some(2),
            Kind::U32 | Kind::I32 | Kind::F32 => Some(4),
            Kind::U64 | Kind::I64 | Kind::F64 => Some(8),
            Kind::Text | Kind::Array => None,
        }
    }
}

impl<'a> Value<'a> {
    /// The value of `key`.
    pub fn read(r: &mut Reader<'a>, kind: Kind, key: &str) -> Result<Self> {
        Self::read_at(r, kind, key, 0)
    }

    fn read_at(r: &mut Reader<'a>, kind: Kind, key: &str, depth: u32) -> Result<Self> {
        let what = format_args!("`{key}`");
        Ok(match kind {
            Kind::U8 => Value::Unsigned(r.array::<1>(what)?[0].into()),
            Kind::I8 => Value::Signed(i8::from_le_bytes(r.array(what)?).into()),
            Kind::U16 => Value::Unsigned(u16::from_le_bytes(r.array(what)?).into()),
            Kind::I16 => Value::Signed(i16::from_le_bytes(r.array(what)?).into()),
            Kind::U32 => Value::Unsigned(r.u32(what)?.into()),
            Kind::I32 => Value::Signed(i32::from_le_bytes(r.array(what)?).into()),
            Kind::U64 => Value::Unsigned(r.u64(what)?),
            Kind::I64 => Value::Signed(i64::from_le_bytes(r.array(what)?)),
            Kind::F32 => Value::Float(widen(f32::from_le_bytes(r.array(what)?))),
            Kind::F64 => Value::Float(f64::from_le_bytes(r.array(what)?)),
            Kind::Bool => match r.array::<1>(what)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => return Err(bad(format!("`{key}` is a bool of {other}, must be 0 or 1"))),
            },
            Kind::Text => Value::Text(r.text(what)?),
            Kind::Array => Value::Array(Array::read(r, key, depth)?),
        })
    }

    /// A whole number that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::Unsigned(n) => Some(n),
            Value::Signed(n) => u64::try_from(n).ok(),
            _ => None,
        }
    }

    /// A number.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Value::Unsigned(n) => Some(n as f64),
            Value::Signed(n) => Some(n as f64),
            Value::Float(x) => Some(x),
            _ => None,
        }
    }

    /// True or false.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Value::Bool(b) => Some(b),
            _ => None,
        }
    }

    /// A text, if it is UTF-8.
    pub fn as_str(&self) -> Option<&'a str> {
        match *self {
            Value::Text(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    /// An array.
    pub fn as_array(&self) -> Option<Array<'a>> {
        match *self {
            Value::Array(array) => Some(array),
            _ => None,
        }
    }
}

/// As a decimal says it: 1e-5 of a file is the 1e-5 of a `config.json`, not the f64 nearest to the f32.
fn widen(x: f32) -> f64 {
    x.to_string().parse().unwrap_or_else(|_| x.into())
}

impl<'a> Array<'a> {
    /// Finds its end; its values are read when they are asked for.
    fn read(r: &mut Reader<'a>, key: &str, depth: u32) -> Result<Self> {
        if depth == MAX_DEPTH {
            return Err(bad(format!("`{key}` is an array inside {MAX_DEPTH} arrays, which is the most")));
        }
        let kind = Kind::of(r.u32(format_args!("the type of `{key}`"))?).map_err(|e| e.context(format!("`{key}`")))?;
        let len = r.u64(format_args!("the length of `{key}`"))?;
        let mut rest = Reader::new(r.rest());
        match kind.size() {
            Some(size) => {
                let too_long = || bad(format!("`{key}` claims {len} values, which no file holds"));
                rest.take(len.checked_mul(size).ok_or_else(too_long)?, format_args!("`{key}`, {len} values,"))?;
            }
            // A text or an array has a length of 8 bytes at least, so this ends with the file.
            None => (0..len).try_for_each(|_| Value::read_at(&mut rest, kind, key, depth + 1).map(drop))?,
        }
        Ok(Array { kind, len, bytes: r.take(rest.at() as u64, key)? })
    }

    /// How many values it has.
    pub fn len(&self) -> usize {
        // They are all in the file, at a byte each or more.
        self.len as usize
    }

    /// Its values in turn.
    pub fn values(self) -> impl Iterator<Item = Value<'a>> {
        let mut r = Reader::new(self.bytes);
        // They were read once, to find the end: none fails.
        (0..self.len).map_while(move |_| Value::read_at(&mut r, self.kind, "", 1).ok())
    }
}

/// As messages quote it.
impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Unsigned(n) => write!(f, "{n}"),
            Value::Signed(n) => write!(f, "{n}"),
            Value::Float(x) => write!(f, "{x}"),
            Value::Bool(b) => write!(f, "{b}"),
            Value::Text(t) => write!(f, "{:?}", String::from_utf8_lossy(&t[..t.len().min(100)])),
            Value::Array(a) => write!(f, "an array of {}", a.len),
        }
    }
}
