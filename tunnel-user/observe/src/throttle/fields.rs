//! Fields of an event: its text, and the source that it is about.

use std::cell::RefCell;
use std::fmt::{self, Debug, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use tracing::Event;
use tracing::field::{Field, Visit};

/// Maximum number of bytes of a value that are read.
const MAX_TEXT: usize = 256;

/// Field that marks a report about omitted lines.
const SUPPRESSED: &str = "suppressed";

/// Fields that name a source: proven identities before addresses and names that any peer may claim. The
/// first one counts.
const SOURCES: [(&str, Claim); 15] = [
    ("agent", Claim::Identity),
    ("server", Claim::Identity),
    ("server_id", Claim::Identity),
    ("remote", Claim::Address),
    ("client", Claim::Address),
    ("address", Claim::Address),
    ("destination", Claim::Address),
    ("node", Claim::Address),
    ("tenant", Claim::Identity),
    ("attachment", Claim::Identity),
    ("frontend", Claim::Identity),
    ("lease", Claim::Identity),
    ("what", Claim::Identity),
    ("name", Claim::Identity),
    ("log.target", Claim::Identity),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Claim {
    Identity,
    Address,
}

/// Source of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Source<'a> {
    /// The process itself.
    Own,
    /// A proven name.
    Identity(&'a str),
    /// An address, which counts for its network, or a name that proves nothing.
    Network(Network<'a>),
}

/// Source of an unauthenticated peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Network<'a> {
    /// An IPv4 address, or the /64 of an IPv6 address.
    Prefix(IpAddr),
    /// A text that is not an address.
    Text(&'a str),
}

impl Source<'_> {
    pub(super) fn write_to(&self, text: &mut String) {
        match self {
            Self::Own => {}
            Self::Identity(name) | Self::Network(Network::Text(name)) => text.push_str(name),
            // Writing to a string does not fail.
            Self::Network(Network::Prefix(prefix)) => drop(write!(text, "{prefix}")),
        }
    }
}

/// Relevant fields of one event.
#[derive(Debug, Default)]
pub(super) struct Fields {
    message: String,
    event: String,
    listener: String,
    /// Index in [`SOURCES`], and the value.
    source: Option<usize>,
    value: String,
    is_exempt: bool,
}

impl Fields {
    /// Reads an event, into memory that this thread uses again.
    pub(super) fn with<T>(event: &Event<'_>, read: impl FnOnce(&Self) -> T) -> T {
        thread_local! {
            static FIELDS: RefCell<Fields> = RefCell::default();
        }
        let visit = |fields: &mut Self| {
            fields.clear();
            event.record(fields);
        };
        FIELDS.with(|fields| match fields.try_borrow_mut() {
            Ok(mut fields) => {
                visit(&mut fields);
                read(&fields)
            }
            // A value that logs while it is written.
            Err(_) => {
                let mut fields = Self::default();
                visit(&mut fields);
                read(&fields)
            }
        })
    }

    fn clear(&mut self) {
        self.message.clear();
        self.event.clear();
        self.listener.clear();
        self.value.clear();
        (self.source, self.is_exempt) = (None, false);
    }

    /// Returns the text of the line.
    pub(super) fn name(&self) -> &str {
        match &*self.event {
            "" => &self.message,
            event => event,
        }
    }

    /// Returns the listener, for lines that many places share.
    pub(super) fn listener(&self) -> &str {
        &self.listener
    }

    /// Whether the line is a report about omitted lines.
    pub(super) fn is_exempt(&self) -> bool {
        self.is_exempt
    }

    /// Returns the source of the line.
    pub(super) fn source(&self) -> Source<'_> {
        match self.source.map(|at| SOURCES[at].1) {
            None => Source::Own,
            Some(Claim::Identity) => Source::Identity(&self.value),
            Some(Claim::Address) => Source::Network(network(&self.value)),
        }
    }

    fn text(&mut self, field: &Field) -> Option<Bounded<'_>> {
        let text = match field.name() {
            "message" => &mut self.message,
            "event" => &mut self.event,
            "listener" => &mut self.listener,
            SUPPRESSED => {
                self.is_exempt = true;
                return None;
            }
            name => {
                let at = SOURCES.iter().position(|(source, _)| *source == name)?;
                if self.source.is_some_and(|before| before <= at) {
                    return None;
                }
                self.source = Some(at);
                &mut self.value
            }
        };
        text.clear();
        Some(Bounded(text))
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        if let Some(mut text) = self.text(field) {
            // A text that is cut is enough.
            let _ = text.write_str(value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if let Some(mut text) = self.text(field) {
            let _ = write!(text, "{value:?}");
        }
    }
}

/// A writer that keeps up to [`MAX_TEXT`] bytes.
struct Bounded<'a>(&'a mut String);

impl Write for Bounded<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = MAX_TEXT.saturating_sub(self.0.len());
        let cut = text.floor_char_boundary(room);
        self.0.push_str(&text[..cut]);
        match cut == text.len() {
            true => Ok(()),
            false => Err(fmt::Error),
        }
    }
}

fn network(text: &str) -> Network<'_> {
    let address = text.parse().map(|address: SocketAddr| address.ip());
    match address.or_else(|_| text.parse()) {
        Ok(address) => Network::Prefix(match address.to_canonical() {
            IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 64)).into(),
            v4 => v4,
        }),
        Err(_) => Network::Text(text),
    }
}
