//! The execution provider of every node of an opened graph.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};
use std::ptr;

use ort::AsPointer;
use ort::session::Session;
use ort::sys::{OrtEpAssignedNode, OrtEpAssignedSubgraph, OrtStatusPtr};

/// The key of the session option that keeps the information that [`nodes`] reads.
pub(super) const RECORD: &str = "session.record_ep_graph_assignment_info";

/// A node of a graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    /// Operator, for example `MatMul`.
    pub(super) operator: String,
    /// Name of the node.
    pub(super) name: String,
}

/// The nodes of an opened graph by execution provider, without the nodes of the graphs inside of nodes. The session was
/// created with [`RECORD`].
///
/// # Errors
/// If ONNX Runtime did not keep the information.
pub(super) fn nodes(session: &Session) -> ort::Result<BTreeMap<String, Vec<Node>>> {
    let api = ort::api();
    let mut found: BTreeMap<String, Vec<Node>> = BTreeMap::new();
    let (mut graphs, mut count): (*const *const OrtEpAssignedSubgraph, usize) = (ptr::null(), 0);
    // SAFETY: the session is open, and the two places are valid for writing.
    check(unsafe { (api.Session_GetEpGraphAssignmentInfo)(session.ptr(), &mut graphs, &mut count) })?;
    for index in 0..count {
        // SAFETY: ONNX Runtime gave an array of `count` pointers, which live as long as the session.
        let graph = unsafe { *graphs.add(index) };
        let provider = text(|out| {
            // SAFETY: the graph is one of the session's.
            unsafe { (api.EpAssignedSubgraph_GetEpName)(graph, out) }
        })?;
        let (mut nodes, mut count): (*const *const OrtEpAssignedNode, usize) = (ptr::null(), 0);
        // SAFETY: as above.
        check(unsafe { (api.EpAssignedSubgraph_GetNodes)(graph, &mut nodes, &mut count) })?;
        for index in 0..count {
            // SAFETY: as above.
            let node = unsafe { *nodes.add(index) };
            // SAFETY: the node is one of the session's.
            let operator = text(|out| unsafe { (api.EpAssignedNode_GetOperatorType)(node, out) })?;
            // SAFETY: as above.
            let name = text(|out| unsafe { (api.EpAssignedNode_GetName)(node, out) })?;
            found.entry(provider.clone()).or_default().push(Node { operator, name });
        }
    }
    Ok(found)
}

/// A text that belongs to ONNX Runtime.
fn text(get: impl FnOnce(*mut *const c_char) -> OrtStatusPtr) -> ort::Result<String> {
    let mut text = ptr::null();
    check(get(&mut text))?;
    // SAFETY: after success, it is null or a text that ends with a zero and lives as long as the session.
    let text = (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) });
    Ok(text.map(|text| text.to_string_lossy().into_owned()).unwrap_or_default())
}

fn check(status: OrtStatusPtr) -> ort::Result<()> {
    // SAFETY: the status came from ONNX Runtime and is used once.
    unsafe { ort::Error::result_from_status(status) }
}

/// Nodes in one line: the operators with their numbers, and the name of the first node.
pub(super) fn list(nodes: &[Node]) -> String {
    let mut operators: BTreeMap<&str, usize> = BTreeMap::new();
    nodes.iter().for_each(|node| *operators.entry(&node.operator).or_default() += 1);
    let operators: Vec<_> = operators
        .into_iter()
        .map(|(operator, count)| if count == 1 { operator.into() } else { format!("{count} {operator}") })
        .collect();
    let first = nodes.first().map(|node| format!(", the first is {}", node.name)).unwrap_or_default();
    format!("{}{first}", operators.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_listed_by_operator() {
        let node = |operator: &str, name: &str| Node { operator: operator.into(), name: name.into() };
        let nodes = [node("MatMul", "blocks.0.mlp"), node("Add", "a"), node("MatMul", "b")];
        assert_eq!(list(&nodes), "Add, 2 MatMul, the first is blocks.0.mlp");
    }
}
