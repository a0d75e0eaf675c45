//! The cluster's own TLS, which runs inside the tunnel and which the connector does not see:
//! an nginx in the kubelet's place and the client certificate of the API server.
//!
//! As a kubelet does, it asks every client for a certificate and lets one without a certificate
//! finish the handshake, to be told 401.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::address::{self, KUBELET_PORT};
use super::netns::run;

/// Certificates of the cluster, created by openssl, in one folder.
#[derive(Clone, Debug)]
pub struct ClusterPki {
    folder: PathBuf,
}

impl ClusterPki {
    /// Creates a certificate authority and the API server's client certificate.
    ///
    /// # Errors
    ///
    /// What openssl says.
    pub fn create(folder: PathBuf) -> Result<Self> {
        let pki = Self { folder };
        openssl(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 \
             -subj /CN=lab-cluster-ca -keyout ca.key -out ca.crt",
            &pki.folder,
        )?;
        pki.issue(
            "apiserver",
            "/O=system:masters/CN=kube-apiserver-kubelet-client",
            "extendedKeyUsage=clientAuth",
        )?;
        Ok(pki)
    }

    /// Returns the folder of the certificates.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns the authority's certificate.
    pub fn ca(&self) -> PathBuf {
        self.folder.join("ca.crt")
    }

    /// Returns the API server's client certificate.
    pub fn client_cert(&self) -> PathBuf {
        self.folder.join("apiserver.crt")
    }

    /// Returns the key of the client certificate.
    pub fn client_key(&self) -> PathBuf {
        self.folder.join("apiserver.key")
    }

    /// Issues `NAME.crt` and `NAME.key` for a server with these subject alternative names.
    fn issue_server(&self, name: &str, names: &[String]) -> Result<()> {
        let names = names.join(",");
        let extension = format!("extendedKeyUsage=serverAuth\nsubjectAltName={names}");
        self.issue(
            name,
            &format!("/O=system:nodes/CN=system:node:{name}"),
            &extension,
        )
    }

    fn issue(&self, name: &str, subject: &str, extension: &str) -> Result<()> {
        fs::write(self.folder.join(format!("{name}.ext")), extension)?;
        openssl(
            &format!(
                "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj {subject} \
                 -keyout {name}.key -out {name}.csr"
            ),
            &self.folder,
        )?;
        openssl(
            &format!(
                "x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 \
                 -extfile {name}.ext -out {name}.crt"
            ),
            &self.folder,
        )
    }
}

/// Writes the configuration of the nginx on worker `n` into `folder` and returns its path.
///
/// # Errors
///
/// The certificate can't be made or a file not be written.
pub fn configure_worker(pki: &ClusterPki, folder: &Path, n: u8) -> Result<PathBuf> {
    let addresses = address::nodes(n).into_iter().chain(address::pods(n));
    let names: Vec<_> = std::iter::once(format!("DNS:w{n}"))
        .chain(addresses.map(|address| format!("IP:{address}")))
        .collect();
    let listen = [format!("{KUBELET_PORT}"), format!("[::]:{KUBELET_PORT}")];
    configure(pki, folder, &format!("w{n}"), &names, &listen)
}

/// Writes the configuration of an nginx that serves as node `name` at the addresses `listen`.
///
/// # Errors
///
/// The certificate can't be made or a file not be written.
pub fn configure(
    pki: &ClusterPki,
    folder: &Path,
    name: &str,
    names: &[String],
    listen: &[String],
) -> Result<PathBuf> {
    pki.issue_server(name, names)?;
    let file = folder.join("nginx.conf");
    let listen: String = listen
        .iter()
        .map(|at| format!("    listen {at} ssl;\n"))
        .collect();
    let folder = folder.display();
    let certificates = pki.folder.display();
    let text = format!(
        r#"daemon off;
pid {folder}/nginx.pid;
error_log {folder}/nginx-error.log;
events {{ worker_connections 8192; }}
http {{
  access_log {folder}/nginx-access.log;
  client_body_temp_path {folder}/nginx-body;
  proxy_temp_path {folder}/nginx-proxy;
  fastcgi_temp_path {folder}/nginx-fastcgi;
  uwsgi_temp_path {folder}/nginx-uwsgi;
  scgi_temp_path {folder}/nginx-scgi;
  server {{
{listen}    ssl_certificate {certificates}/{name}.crt;
    ssl_certificate_key {certificates}/{name}.key;
    ssl_client_certificate {certificates}/ca.crt;
    ssl_verify_client optional;
    location /files/ {{
      root {folder};
    }}
    location / {{
      default_type application/json;
      if ($ssl_client_verify != SUCCESS) {{
        return 401 "Unauthorized\n";
      }}
      return 200 '{{"node":"{name}","path":"$uri","client":"$ssl_client_s_dn"}}\n';
    }}
  }}
}}
"#
    );
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(file)
}

fn openssl(arguments: &str, folder: &Path) -> Result<()> {
    let mut openssl = Command::new("openssl");
    run(
        openssl
            .args(arguments.split_whitespace())
            .current_dir(folder),
        "",
    )
}
