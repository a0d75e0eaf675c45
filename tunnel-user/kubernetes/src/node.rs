//! Addresses of a node, from its Node object.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Node;
use kube::{Api, Client};

use super::client::{CallError, call};

/// Failure to read a node, for the log.
#[derive(Debug, thiserror::Error)]
#[error(
    "the Node {node} can't be read: {why}; the account of join.kubernetes.kubeconfig needs permission to get nodes"
)]
pub struct NodeError {
    node: String,
    why: CallError,
}

/// Reader of nodes.
#[derive(Clone)]
pub struct Nodes(Api<Node>);

impl Nodes {
    /// Creates a reader over `client`.
    pub fn new(client: Client) -> Self {
        Self(Api::all(client))
    }

    /// Returns the addresses of the node `name`; `None` when there is no such node.
    ///
    /// # Errors
    /// [`NodeError`].
    pub async fn addresses(&self, name: &str) -> Result<Option<Vec<IpAddr>>, NodeError> {
        match call(self.0.get(name)).await {
            Ok(node) => Ok(Some(addresses(node))),
            Err(error) if error.is_not_found() => Ok(None),
            Err(why) => Err(NodeError {
                node: name.into(),
                why,
            }),
        }
    }
}

fn addresses(node: Node) -> Vec<IpAddr> {
    let listed = node.status.and_then(|status| status.addresses);
    let of_the_node = listed.into_iter().flatten().filter_map(|address| {
        let counts = matches!(&*address.type_, "InternalIP" | "ExternalIP");
        let address: Option<IpAddr> = address.address.parse().ok();
        address.filter(|_| counts).map(|it| it.to_canonical())
    });
    of_the_node.collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tunnel_fake_kubernetes::FakeKubernetes;

    use super::*;
    use crate::client;
    use cpc_config::kubernetes::Access;

    #[tokio::test]
    async fn the_addresses_of_a_node_are_its_ips() {
        let api = FakeKubernetes::start().unwrap();
        let kubeconfig = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(kubeconfig.path(), api.kubeconfig()).unwrap();
        let access = Access {
            kubeconfig: Some(kubeconfig.path().into()),
            rate: None,
        };
        let nodes = Nodes::new(client(&access).await.unwrap());
        api.put_node(json!({
            "metadata": {"name": "w1"},
            "status": {"addresses": [
                {"type": "Hostname", "address": "10.99.0.9"},
                {"type": "InternalIP", "address": "10.99.0.1"},
                {"type": "InternalIP", "address": "fd00::1"},
                {"type": "ExternalIP", "address": "192.0.2.1"},
                {"type": "InternalDNS", "address": "w1.internal"},
            ]},
        }));
        api.put_node(json!({"metadata": {"name": "w2"}}));
        let found = nodes.addresses("w1").await.unwrap().unwrap();
        let expected = ["10.99.0.1", "fd00::1", "192.0.2.1"];
        assert_eq!(found, expected.map(|it| it.parse::<IpAddr>().unwrap()));
        assert_eq!(nodes.addresses("w2").await.unwrap(), Some(vec![]));
        assert_eq!(nodes.addresses("w3").await.unwrap(), None);
        api.fail_with(403);
        let error = nodes.addresses("w1").await.unwrap_err().to_string();
        assert!(
            error.contains("w1") && error.contains("get nodes"),
            "{error}"
        );
    }
}
