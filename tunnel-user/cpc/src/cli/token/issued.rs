//! `cpc token issued` and `cpc token release`: who holds names and addresses.

use std::net::IpAddr;
use std::time::SystemTime;

use anyhow::bail;
use serde_json::json;

use super::super::status::table;
use cpc_identity::join::clock::Time;
use cpc_identity::join::issue_records::{Holder, IssueRecords};
use cpc_identity::join::{IssueLog, IssueLogError};

pub(super) fn list(log: &IssueLog, by_hand: &IssueLog, json: bool) -> anyhow::Result<()> {
    let mut records = log.read()?;
    records.by_hand = by_hand.read()?.issued;
    let time = Time::of(SystemTime::now());
    let shown = |at| humantime::format_rfc3339_seconds(at).to_string();
    let valid = || records.holders().filter(|(_, it)| time.now < it.until);
    if json {
        let holders = valid().map(|(node, holder)| {
            json!({
                "node": node,
                "addresses": holder.addresses,
                "serial": holder.serial,
                "since": shown(holder.since),
                "until": shown(holder.until),
                "token": holder.token,
                "holds_name": records.holds_name(holder, time),
                "holds_addresses": held(&records, holder, time),
            })
        });
        println!("{:#}", json!(holders.collect::<Vec<_>>()));
        return Ok(());
    }
    let mut table = table(&["NODE", "ADDRESSES", "HOLDS", "SERIAL", "UNTIL", "TOKEN"]);
    for (node, holder) in valid() {
        let text = |addresses: &[IpAddr]| {
            let lines: Vec<_> = addresses.iter().map(ToString::to_string).collect();
            lines.join("\n")
        };
        let held = held(&records, holder, time);
        let holds = match records.holds_name(holder, time) {
            false => "released".into(),
            true if held == holder.addresses => "all".into(),
            true if held.is_empty() => "its name".into(),
            true => text(&held),
        };
        table.add_row([
            node.into(),
            text(&holder.addresses),
            holds,
            holder.serial.clone(),
            shown(holder.until),
            holder.token.clone(),
        ]);
    }
    println!("{table}");
    Ok(())
}

pub(super) fn release(
    log: &IssueLog,
    by_hand: &IssueLog,
    node: Option<&str>,
    addresses: &[IpAddr],
) -> anyhow::Result<()> {
    let addresses: Vec<_> = addresses.iter().map(IpAddr::to_canonical).collect();
    let by_hand = by_hand.read()?.issued;
    let time = Time::of(SystemTime::now());
    let released = log.change(|records| {
        records.by_hand = by_hand;
        let is_meant = |of: &str, holder: &Holder| {
            node.is_none_or(|node| node == of)
                && match addresses.is_empty() {
                    true => records.holds_name(holder, time),
                    false => { addresses.iter() }.any(|it| records.holds_address(holder, it, time)),
                }
        };
        let meant = records
            .holders()
            .filter(|(of, holder)| is_meant(of, holder));
        let meant: Vec<_> = meant
            .map(|(of, holder)| (of.to_owned(), holder.clone()))
            .collect();
        for (_, holder) in &meant {
            let named = addresses.iter().filter(|it| holder.addresses.contains(it));
            named.for_each(|address| records.release_address(&holder.serial, *address));
            if addresses.is_empty() {
                records.release(&holder.serial);
            }
        }
        Ok::<_, IssueLogError>(meant)
    })?;
    if released.is_empty() {
        bail!(
            "no valid certificate on record holds that; `cpc token issued` shows all certificates"
        );
    }
    for (node, holder) in released {
        let until = humantime::format_rfc3339_seconds(holder.until);
        let serial = holder.serial;
        println!(
            "{node}: released; its certificate is valid until {until}: serial:{serial} in tls.revoked ends it"
        );
    }
    Ok(())
}

fn held(records: &IssueRecords, holder: &Holder, time: Time) -> Vec<IpAddr> {
    let addresses = holder.addresses.iter().copied();
    { addresses.filter(|it| records.holds_address(holder, it, time)) }.collect()
}
