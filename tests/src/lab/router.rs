//! The NAT router between the control plane and the workers.
//!
//! Workers may open connections to the control plane, through masquerading; nothing may be opened
//! towards a worker. The router itself reaches both sides, which is where a measurement of the
//! direct way starts.

use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::address;
use super::netns::{Netns, run};
use super::shaper::Shaper;

/// Ports of a mapping: each generation has a range of its own, so that a new one never happens to
/// give a flow its old port back.
const FIRST_PORT: u32 = 20_000;
const PORTS: u32 = 10_000;
const GENERATIONS: u32 = 4;

/// The router of a laboratory.
#[derive(Debug)]
pub struct Router {
    /// Namespace: interface `cp` towards the control plane, `wN` towards worker N.
    pub netns: Netns,
    generation: u32,
    /// Number of times that flows were lost.
    lost: u32,
}

impl Router {
    /// Creates the router and the control plane's side of it in `control_plane`, with an address
    /// for each of `servers`.
    ///
    /// # Errors
    ///
    /// What the kernel refuses, as `ip` or `nft` says it.
    pub fn create(netns: Netns, control_plane: &Netns, servers: u8) -> Result<Self> {
        let router = Self {
            netns,
            generation: 0,
            lost: 0,
        };
        router.add_veth("cp", control_plane)?;
        router.address_control_plane(control_plane, servers)?;
        router.netns.sysctl("ipv4/ip_forward", "1")?;
        router.netns.sysctl("ipv6/conf/all/forwarding", "1")?;
        router.apply_rules()?;
        Ok(router)
    }

    /// Connects worker `n`; the router is then the worker's only way out.
    ///
    /// # Errors
    ///
    /// What the kernel refuses, as `ip` says it.
    pub fn connect(&self, worker: &Netns, n: u8) -> Result<()> {
        self.add_veth(&format!("w{n}"), worker)?;
        self.address_worker(worker, n)
    }

    /// Puts a path that can be impaired in the place of that to the control plane.
    pub(super) fn shape_control_plane(&self, control_plane: &Netns, servers: u8) -> Result<Shaper> {
        let shaper = self.replace("cp", control_plane)?;
        self.address_control_plane(control_plane, servers)?;
        Ok(shaper)
    }

    /// Puts a path that can be impaired in the place of that to worker `n`.
    pub(super) fn shape_worker(&self, worker: &Netns, n: u8) -> Result<Shaper> {
        let shaper = self.replace(&format!("w{n}"), worker)?;
        self.address_worker(worker, n)?;
        Ok(shaper)
    }

    fn replace(&self, link: &str, other: &Netns) -> Result<Shaper> {
        // Both ends of it, and all addresses and routes over them.
        self.netns.ip(&format!("link delete {link}\n"))?;
        Shaper::start((&self.netns, link), (other, "eth0"))
    }

    fn add_veth(&self, link: &str, other: &Netns) -> Result<()> {
        let other = other.name();
        let pair = format!("link add {link} type veth peer name eth0 netns {other}\n");
        self.netns.ip(&pair)
    }

    fn address_control_plane(&self, control_plane: &Netns, servers: u8) -> Result<()> {
        self.netns.ip(&format!(
            "address add {}/24 dev cp\n\
             address add {}/64 dev cp nodad\n\
             link set cp up\n",
            address::ROUTER,
            address::ROUTER_V6,
        ))?;
        control_plane.ip("link set eth0 up\n")?;
        for k in 1..=servers {
            control_plane.ip(&format!(
                "address add {}/24 dev eth0\naddress add {}/64 dev eth0 nodad\n",
                address::server(k),
                address::server_v6(k),
            ))?;
        }
        Ok(())
    }

    fn address_worker(&self, worker: &Netns, n: u8) -> Result<()> {
        self.netns.ip(&format!(
            "address add {}/24 dev w{n}\n\
             address add {}/64 dev w{n} nodad\n\
             link set w{n} up\n",
            address::gateway(n),
            address::gateway_v6(n),
        ))?;
        let [pods, pods_v6] = address::pod_networks(n);
        self.netns.ip(&format!(
            "route add {pods} via {}\nroute add {pods_v6} via {}\n",
            address::node(n),
            address::node_v6(n),
        ))?;
        worker.ip(&format!(
            "link set eth0 up\n\
             address add {}/24 dev eth0\n\
             address add {}/64 dev eth0 nodad\n\
             address replace {}/32 dev lo\n\
             address replace {}/128 dev lo nodad\n\
             route add default via {}\n\
             route add default via {}\n",
            address::node(n),
            address::node_v6(n),
            address::pod(n),
            address::pod_v6(n),
            address::gateway(n),
            address::gateway_v6(n),
        ))
    }

    /// Drops every mapping and gives new ones other ports, as a restarted router does.
    ///
    /// # Errors
    ///
    /// What `nft` or `conntrack` says.
    pub fn remap(&mut self) -> Result<()> {
        self.generation = (self.generation + 1) % GENERATIONS;
        self.apply_rules()?;
        run(self.netns.command("conntrack")?.arg("--flush"), "")
    }

    /// Drops packets from worker `n` for the control plane; the other direction stays open.
    ///
    /// # Errors
    ///
    /// What `nft` says.
    pub fn silence(&self, n: u8) -> Result<()> {
        self.netns.nft(&format!(
            "table inet silence {{
               chain forward {{
                 type filter hook forward priority filter - 1; policy accept;
                 iifname \"w{n}\" oifname \"cp\" drop
               }}
             }}"
        ))
    }

    /// Ends what [`Self::silence`] has begun.
    ///
    /// # Errors
    ///
    /// The error of `nft`.
    pub fn hear(&self) -> Result<()> {
        self.netns.nft("delete table inet silence")
    }

    /// Drops every packet of the present flows over UDP, in both directions, for good. New flows pass.
    ///
    /// # Errors
    ///
    /// What `nft` says.
    pub fn lose_flows(&mut self) -> Result<()> {
        self.lost += 1;
        let mark = self.lost;
        self.netns.nft(&format!(
            "add table inet lost
             delete table inet lost
             table inet lost {{
               chain forward {{
                 type filter hook forward priority filter - 1; policy accept;
                 meta l4proto udp ct state new ct mark set {mark} accept
                 meta l4proto udp ct mark != {mark} drop
               }}
             }}"
        ))
    }

    /// Returns the number of packets from the control plane to a worker by the ordinary route,
    /// since the start or the last [`Self::remap`]. The router has dropped them.
    ///
    /// # Errors
    ///
    /// What `nft` says.
    pub fn leaked(&self) -> Result<u64> {
        let mut nft: Command = self.netns.command("nft")?;
        let output = nft
            .args(["-j", "list", "counter", "inet", "lab", "leaked"])
            .output()?;
        if !output.status.success() {
            bail!(
                "`nft list counter` failed: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        let listing: Value = serde_json::from_slice(&output.stdout)?;
        let objects = listing["nftables"]
            .as_array()
            .context("nft lists nothing")?;
        objects
            .iter()
            .find_map(|object| object["counter"]["packets"].as_u64())
            .context("nft lists no counter")
    }

    fn apply_rules(&self) -> Result<()> {
        let first = FIRST_PORT + self.generation * PORTS;
        let last = first + PORTS - 1;
        self.netns.nft(&format!(
            "add table inet lab
             delete table inet lab
             table inet lab {{
               counter leaked {{ }}
               chain forward {{
                 type filter hook forward priority filter; policy drop;
                 ct state established,related accept
                 iifname \"w*\" oifname \"cp\" accept
                 iifname \"cp\" counter name leaked
               }}
               chain input {{
                 type filter hook input priority filter; policy accept;
                 iifname \"cp\" ct state new meta l4proto {{ tcp, udp }} drop
               }}
               chain postrouting {{
                 type nat hook postrouting priority srcnat; policy accept;
                 oifname \"cp\" meta l4proto {{ tcp, udp }} masquerade to :{first}-{last}
                 oifname \"cp\" masquerade
               }}
             }}"
        ))
    }
}
