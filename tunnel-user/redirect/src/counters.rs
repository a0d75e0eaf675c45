//! What the programs have counted.

use tunnel_ebpf_common::{Counter, counter_index};

use super::{
    RedirectError,
    maps::{self, Access, failed},
    pin::Pin,
    spec,
};

/// One counter of one attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Count {
    /// The attachment's name.
    pub attachment: String,
    /// What was counted.
    pub counter: Counter,
    /// How often since the attachment was made; goes on over restarts of the connector.
    pub value: u64,
}

/// Reads the counters of all attachments.
pub struct Counters {
    attachments: maps::Attachments,
    map: maps::CounterMap,
}

impl Counters {
    pub(super) fn open(pin: &Pin) -> Result<Self, RedirectError> {
        Ok(Self {
            attachments: maps::attachments(pin, Access::Read)?,
            map: maps::counters(pin, Access::Read)?,
        })
    }

    /// All counters as they stand now.
    pub fn read(&self) -> Result<Vec<Count>, RedirectError> {
        let mut counts = Vec::new();
        for entry in self.attachments.iter() {
            let (id, attachment) = entry.map_err(failed("ATTACHMENTS"))?;
            let name = spec::unpadded(&attachment.name);
            for (counter, value) in of(&self.map, id)? {
                counts.push(Count {
                    attachment: name.clone(),
                    counter,
                    value,
                });
            }
        }
        Ok(counts)
    }
}

/// The counters of one attachment, summed over the processors.
pub(super) fn of(map: &maps::CounterMap, id: u32) -> Result<Vec<(Counter, u64)>, RedirectError> {
    let value = |counter| {
        let values = map
            .get(&counter_index(id, counter), 0)
            .map_err(failed("COUNTERS"))?;
        Ok((counter, values.iter().sum()))
    };
    Counter::ALL.into_iter().map(value).collect()
}
