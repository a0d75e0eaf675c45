//! Counters of the programs.

use tunnel_ebpf_common::{Counter, counter_index};

use super::{
    RedirectError,
    link::Access,
    maps::{self, failed},
    pin::Pin,
    spec,
};

/// One counter of one attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Count {
    /// Name of the attachment.
    pub attachment: String,
    /// Kind of the counter.
    pub counter: Counter,
    /// Value since the attachment was created; continues over restarts of the connector.
    pub value: u64,
}

/// Reader of the counters of all attachments.
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

    /// Returns the present values of all counters.
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

/// Returns the counters of one attachment, summed over the processors.
pub(super) fn of(map: &maps::CounterMap, id: u32) -> Result<Vec<(Counter, u64)>, RedirectError> {
    let value = |counter| {
        let values = map
            .get(&counter_index(id, counter), 0)
            .map_err(failed("COUNTERS"))?;
        Ok((counter, values.iter().sum()))
    };
    Counter::ALL.into_iter().map(value).collect()
}
