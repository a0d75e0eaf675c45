//! A running `cpc server` or `cpc agent`.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::Value;

use super::cgroup::Cgroup;
use super::hosts;
use super::netns::Netns;
use super::process::{Process, end_with_parent};
use crate::client::eventually;

/// Timeout of the admin address; a stopped process never answers.
const ANSWER: Duration = Duration::from_secs(2);
/// The largest answer that is read, in bytes.
const LONGEST_ANSWER: u64 = 16 << 20;

/// Role of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// `cpc server`
    Server,
    /// `cpc agent`
    Agent,
}

/// A server or an agent with its configuration, running or not. Dropping the value leaves it
/// running.
#[derive(Debug)]
pub struct Daemon {
    /// `s1`, `w1`, ..
    pub name: String,
    /// Admin address, in its namespace.
    pub admin: SocketAddr,
    role: Role,
    cpc: PathBuf,
    folder: PathBuf,
    /// Absent in the demonstration without root.
    place: Option<(Netns, Cgroup)>,
    config: Value,
    /// Own `/etc/hosts`, if it has one.
    hosts: Option<PathBuf>,
    process: Option<Process>,
}

impl Daemon {
    /// Creates one that does not run yet, and writes its configuration to `folder`.
    ///
    /// # Errors
    ///
    /// The configuration can't be written.
    pub fn new(
        role: Role,
        name: &str,
        cpc: &Path,
        folder: PathBuf,
        place: Option<(Netns, Cgroup)>,
        config: Value,
    ) -> Result<Self> {
        let admin = config["admin"]
            .as_str()
            .context("the configuration has no admin address")?;
        let daemon = Self {
            name: name.to_owned(),
            admin: admin.parse()?,
            role,
            cpc: cpc.to_owned(),
            folder,
            place,
            config,
            hosts: None,
            process: None,
        };
        daemon.write_config()?;
        Ok(daemon)
    }

    /// Returns its configuration file.
    pub fn config_file(&self) -> PathBuf {
        self.folder.join(match self.role {
            Role::Server => "server.yaml",
            Role::Agent => "agent.yaml",
        })
    }

    /// Returns its log, which continues over restarts.
    pub fn log_file(&self) -> PathBuf {
        self.folder.join(format!("{}.log", self.name))
    }

    /// Returns the log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    /// Waits for a line of its log that holds all of `pieces`, below its first `after` bytes.
    ///
    /// # Errors
    ///
    /// There is none within `limit`; the error has the log from there on, without the connections.
    pub fn wait_log(&self, limit: Duration, after: usize, pieces: &[&str]) -> Result<String> {
        eventually(limit, || {
            let log = self.log();
            let new = log.get(after..).unwrap_or_default();
            let holds_all = |line: &&str| pieces.iter().all(|piece| line.contains(piece));
            let found = new.lines().find(holds_all).map(str::to_owned);
            found.with_context(|| {
                let lines = new.lines().filter(|line| !line.contains("cpc::access"));
                let lines: Vec<_> = lines.collect();
                format!("{} logged no {pieces:?}:\n{}", self.name, lines.join("\n"))
            })
        })
    }

    /// Returns its resident memory, in KiB.
    ///
    /// # Errors
    ///
    /// It is not running.
    pub fn memory(&self) -> Result<u64> {
        let status = fs::read_to_string(self.proc()?.join("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let text = line.context("no VmRSS")?.trim().trim_end_matches(" kB");
        Ok(text.parse()?)
    }

    /// Returns the number of its open file descriptors.
    ///
    /// # Errors
    ///
    /// It is not running.
    pub fn open_files(&self) -> Result<usize> {
        Ok(fs::read_dir(self.proc()?.join("fd"))?.count())
    }

    /// Changes its configuration file; it notices at its next start or reload.
    ///
    /// # Errors
    ///
    /// The file can't be written.
    pub fn configure(&mut self, change: impl FnOnce(&mut Value)) -> Result<()> {
        change(&mut self.config);
        self.write_config()
    }

    /// Gives it an `/etc/hosts` of its own, from its next start on.
    ///
    /// # Errors
    ///
    /// The file can't be written.
    pub fn set_hosts(&mut self, text: &str) -> Result<()> {
        let file = self.folder.join("hosts");
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        self.hosts = Some(file);
        Ok(())
    }

    /// Starts it, without waiting for anything.
    ///
    /// # Errors
    ///
    /// It runs already or can't be started.
    pub fn start(&mut self) -> Result<()> {
        self.start_with(|_| ())
    }

    /// Starts another program from now on.
    pub fn set_program(&mut self, cpc: &Path) {
        cpc.clone_into(&mut self.cpc);
    }

    /// Starts it after `prepare` has changed its environment or its descriptors.
    ///
    /// # Errors
    ///
    /// It runs already or can't be started.
    pub fn start_with(&mut self, prepare: impl FnOnce(&mut Command)) -> Result<()> {
        if self.process.is_some() {
            bail!("{} runs already", self.name);
        }
        let mut command = match &self.place {
            Some((netns, cgroup)) => {
                let mut command = netns.command(&self.cpc)?;
                cgroup.place(&mut command)?;
                command
            }
            None => {
                let mut command = Command::new(&self.cpc);
                end_with_parent(&mut command);
                command
            }
        };
        if let Some(hosts) = &self.hosts {
            hosts::place(&mut command, hosts.clone());
            // resolv.conf(5): no name server can be reached from here, which need not take long.
            command.env("RES_OPTIONS", "timeout:1 attempts:1");
        }
        command.arg(match self.role {
            Role::Server => "server",
            Role::Agent => "agent",
        });
        command.arg("--config").arg(self.config_file());
        prepare(&mut command);
        self.process = Some(Process::start(&self.name, &mut command, &self.log_file())?);
        Ok(())
    }

    /// Ends it with SIGKILL.
    ///
    /// # Errors
    ///
    /// It was not running.
    pub fn kill(&mut self) -> Result<()> {
        self.running()?.kill()?;
        self.process = None;
        Ok(())
    }

    /// Ends it as an administrator does, with SIGTERM.
    ///
    /// # Errors
    ///
    /// It was not running or did not end by itself.
    pub fn terminate(&mut self) -> Result<()> {
        self.running()?.terminate()?;
        self.process = None;
        Ok(())
    }

    /// Sends it a signal, without waiting for anything.
    ///
    /// # Errors
    ///
    /// It is not running.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        self.running()?.signal(signal)
    }

    /// Waits until it has ended by itself, after a [`Self::signal`].
    ///
    /// # Errors
    ///
    /// It still runs after `limit`, or ended with another code than 0.
    pub fn wait_ended(&mut self, limit: Duration) -> Result<()> {
        let process = self.running()?;
        let status = process.wait(limit)?;
        let log = process.log_tail();
        self.process = None;
        if !status.success() {
            bail!("{} ended with {status}:\n{log}", self.name);
        }
        Ok(())
    }

    /// Ends it with SIGTERM and starts it again.
    ///
    /// # Errors
    ///
    /// As [`Self::terminate`] and [`Self::start`].
    pub fn restart(&mut self) -> Result<()> {
        self.terminate()?;
        self.start()
    }

    /// Starts a successor (`--replace`), and waits until this process has ended in order.
    ///
    /// # Errors
    ///
    /// It was not running, or did not end within `limit`.
    pub fn replace(&mut self, limit: Duration) -> Result<()> {
        self.replace_with(limit, |_| ())
    }

    /// Does the same, after `prepare` has changed the environment of the successor.
    ///
    /// # Errors
    ///
    /// As [`Self::replace`].
    pub fn replace_with(
        &mut self,
        limit: Duration,
        prepare: impl FnOnce(&mut Command),
    ) -> Result<()> {
        self.running()?.check()?;
        let mut old = self.process.take().context("it was running")?;
        self.start_with(|command| {
            command.arg("--replace");
            prepare(command);
        })?;
        let status = old.wait(limit)?;
        if !status.success() {
            bail!("{} ended with {status}:\n{}", self.name, old.log_tail());
        }
        Ok(())
    }

    /// Halts it (SIGSTOP): it is there, and does nothing.
    ///
    /// # Errors
    ///
    /// It is not running.
    pub fn stop(&mut self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Lets it go on (SIGCONT).
    ///
    /// # Errors
    ///
    /// It is not running.
    pub fn cont(&mut self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// Fails if it has ended, with the end of its log.
    ///
    /// # Errors
    ///
    /// It has ended, or was never started.
    pub fn check(&mut self) -> Result<()> {
        self.running()?.check()
    }

    /// Returns its process id, while it runs.
    pub fn pid(&self) -> Option<Pid> {
        self.process.as_ref().map(Process::pid)
    }

    /// Waits until `/readyz` answers 200: a server that hears an agent, an agent that reached a
    /// server.
    ///
    /// # Errors
    ///
    /// It has ended, or is not ready within `limit`.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        let deadline = std::time::Instant::now() + limit;
        loop {
            self.running()?.check()?;
            match self.get("/readyz") {
                Ok((200, _)) => return Ok(()),
                _ if std::time::Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                answer => {
                    let log = self.running()?.log_tail();
                    bail!(
                        "{} is not ready after {limit:?}: {answer:?}\n{log}",
                        self.name
                    );
                }
            }
        }
    }

    /// Sends a request to its admin address; returns the status and the body.
    ///
    /// # Errors
    ///
    /// No process listens, or no answer comes in 2 s.
    pub fn get(&self, path: &str) -> Result<(u16, String)> {
        match &self.place {
            Some((netns, _)) => netns.enter(|| get(self.admin, path)),
            None => get(self.admin, path),
        }
    }

    /// Does the same as [`get_with`], at the admin address.
    ///
    /// # Errors
    ///
    /// No process listens, or no answer comes in 2 s.
    pub fn get_with(&self, path: &str, fields: &str) -> Result<(String, Vec<u8>)> {
        match &self.place {
            Some((netns, _)) => netns.enter(|| get_with(self.admin, path, fields)),
            None => get_with(self.admin, path, fields),
        }
    }

    /// Waits until `/status` satisfies `condition`.
    ///
    /// # Errors
    ///
    /// What the status was when the time was over.
    pub fn wait_status(
        &self,
        limit: Duration,
        condition: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        eventually(limit, || {
            let (_, body) = self.get("/status")?;
            let status: Value = serde_json::from_str(&body)?;
            if condition(&status) {
                Ok(status)
            } else {
                bail!("the status of {} is {status}", self.name)
            }
        })
    }

    fn proc(&self) -> Result<PathBuf> {
        let pid = self
            .pid()
            .with_context(|| format!("{} is not running", self.name))?;
        Ok(PathBuf::from(format!("/proc/{pid}")))
    }

    fn running(&mut self) -> Result<&mut Process> {
        self.process
            .as_mut()
            .with_context(|| format!("{} is not running", self.name))
    }

    fn write_config(&self) -> Result<()> {
        let text = serde_saphyr::to_string(&self.config)?;
        let file = self.config_file();
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
    }
}

/// Sends a GET without a library: the answer ends with the connection. Returns the status and the
/// body.
///
/// # Errors
///
/// No process listens, or no answer comes in 2 s.
pub fn get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let (head, body) = get_with(address, path, "")?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.with_context(|| format!("not HTTP: {head}"))?;
    Ok((status, String::from_utf8(body)?))
}

/// Does the same with further `fields`, each with its line's end. Returns the answer's head, and
/// its body as sent.
///
/// # Errors
///
/// As above.
pub fn get_with(address: SocketAddr, path: &str, fields: &str) -> Result<(String, Vec<u8>)> {
    let mut stream = TcpStream::connect_timeout(&address, ANSWER)?;
    stream.set_read_timeout(Some(ANSWER))?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n{fields}\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.take(LONGEST_ANSWER).read_to_end(&mut answer)?;
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n");
    let end = end.context("the answer has no end of its head")?;
    let body = answer.split_off(end + 4);
    Ok((String::from_utf8(answer)?, body))
}
