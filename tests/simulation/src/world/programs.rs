//! Servers and agents of the world: start, crash, drain, reload, and steps of their clocks.

use anyhow::Result;
use cpc_agent::extension;
use cpc_config::server::AttachmentConfig;
use cpc_host::environment::{Controller, Environment};
use cpc_server::Capture;

use super::{Program, Redirected, Run, World};
use crate::process::Process;
use crate::topology::CAPTURE_PORT;

impl World {
    /// Starts a server that does not run.
    ///
    /// # Errors
    /// Its runtime can't be made.
    pub fn start_server(&mut self, index: usize) -> Result<()> {
        let origins = Box::new(Redirected(self.requested[index].clone()));
        let config = self.topology.server_config(&self.shared, index);
        let attachment: AttachmentConfig = serde_json::from_value(serde_json::json!({
            "name": "simulated", "cgroup": "/", "capture": [{"cidr": "10.0.0.0/8"}],
            "listen": [format!("127.0.0.1:{CAPTURE_PORT}")],
        }))?;
        let log = self.shared.log.clone();
        self.servers[index].start(move |environment| async move {
            let captures = vec![Capture {
                attachment,
                origins,
            }];
            let again = config.clone();
            let reread = move || Ok(again.clone());
            let ran = cpc_server::run_embedded(config, log, environment, captures, reread);
            Ok(ran.await?)
        })
    }

    /// Starts an agent that does not run.
    ///
    /// # Errors
    /// Its runtime can't be made.
    pub fn start_agent(&mut self, index: usize) -> Result<()> {
        let run = self.agents[index].started;
        let config = { &self.topology }.agent_config(&self.shared, index, run, &self.state);
        let log = self.shared.log.clone();
        self.agents[index].start(move |environment| async move {
            let again = config.clone();
            let reread = move || Ok(again.clone());
            Ok(cpc_agent::run_embedded(environment, config, log, extension::none, reread).await?)
        })
    }

    /// Ends a server at once: a crash.
    pub fn crash_server(&mut self, index: usize) {
        self.servers[index].runs.clear();
    }

    /// Ends an agent at once.
    pub fn crash_agent(&mut self, index: usize) {
        self.agents[index].runs.clear();
    }

    /// Requests the orderly end of a server; a second time its immediate one.
    pub fn stop_server(&mut self, index: usize) {
        self.servers[index].stop();
    }

    /// Requests the orderly end of an agent; a second time its immediate one.
    pub fn stop_agent(&mut self, index: usize) {
        self.agents[index].stop();
    }

    /// Requests the orderly end of the process before the last one of an agent.
    pub fn stop_former_agent(&mut self, index: usize) {
        if let [.., former, _] = &mut self.agents[index].runs[..] {
            former.is_stopping = true;
            former.control(Controller::stop);
        }
    }

    /// Requests a reload of every program.
    pub fn reload(&mut self) {
        for program in self.servers.iter_mut().chain(&mut self.agents) {
            for run in &mut program.runs {
                run.control(Controller::reload);
            }
        }
    }

    /// Whether a server has a process, one that drains included.
    pub fn has_server(&self, index: usize) -> bool {
        !self.servers[index].runs.is_empty()
    }

    /// Whether an agent has a process that does not drain.
    pub fn has_agent(&self, index: usize) -> bool {
        self.agents[index].runs.iter().any(|run| !run.is_stopping)
    }

    /// Whether a program drains.
    pub fn is_stopping(&self) -> bool {
        let mut runs = self
            .servers
            .iter()
            .chain(&self.agents)
            .flat_map(|it| &it.runs);
        runs.any(|run| run.is_stopping)
    }

    /// Ends every drain.
    pub fn end_drains(&mut self) {
        let programs = self.servers.iter_mut().chain(&mut self.agents);
        for run in programs
            .flat_map(|it| &mut it.runs)
            .filter(|run| run.is_stopping)
        {
            run.control(Controller::stop);
        }
    }

    /// Moves the wall clock of a program's host.
    pub fn step_clock(&mut self, is_server: bool, index: usize, by: i64) {
        let programs = match is_server {
            true => &mut self.servers,
            false => &mut self.agents,
        };
        let program = &mut programs[index];
        program.wall += by;
        for run in &mut program.runs {
            run.process.step_clock(by);
        }
    }
}

impl Program {
    fn start<F>(&mut self, task: impl FnOnce(Environment) -> F) -> Result<()>
    where
        F: Future<Output = Result<()>> + 'static,
    {
        let mut process = Process::new(self.host, self.wall)?;
        let (environment, controller) = Environment::embedded();
        let done = process.spawn(task(environment));
        self.runs.push(Run {
            process,
            controller,
            done,
            number: self.started,
            is_stopping: false,
            has_ended: false,
        });
        self.started += 1;
        Ok(())
    }

    /// Requests the end of the last process.
    fn stop(&mut self) {
        if let Some(run) = self.runs.last_mut() {
            run.is_stopping = true;
            run.control(Controller::stop);
        }
    }
}

impl Run {
    fn control(&mut self, request: impl Fn(&Controller)) {
        self.process.run(|| request(&self.controller));
    }
}
