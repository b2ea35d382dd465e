//! A filter as a graph of decisions, and its way into a linear program.
//!
//! Nodes are built from the end of the program backwards and equal nodes are
//! one node, so calls with equal argument checks share them, jumps to jumps do
//! not exist and unreachable code cannot be emitted. [`Graph::emit`] lays the
//! graph out and inserts the far jumps that the 8-bit offsets of classic BPF need.

use std::collections::HashMap;

use crate::program::{self as bpf, Program, SockFilter};

/// How many nodes a graph may have. Far above what fits a program; bounds the
/// work that a hostile profile can cause.
const MAX_NODES: usize = 1 << 16;

/// A node of a [`Graph`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeId(usize);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Node {
    /// The verdict.
    Ret(u32),
    /// An instruction that changes the accumulator, then `next`.
    Step { code: u16, k: u32, next: NodeId },
    /// A comparison of the accumulator with `k`.
    Branch {
        code: u16,
        k: u32,
        yes: NodeId,
        no: NodeId,
    },
}

/// What the accumulator holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Held {
    Unknown,
    /// The word at this offset, cut down by this mask.
    Word(u32, u32),
}

/// The filter is larger than the kernel, or this compiler, takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the filter has {size} instructions, the kernel takes {limit}")]
pub struct TooLarge {
    /// How large it became before the work was stopped.
    pub size: usize,
    /// What is possible.
    pub limit: usize,
}

/// Decisions that end in verdicts; acyclic by construction.
#[derive(Debug, Default)]
pub struct Graph {
    nodes: Vec<Node>,
    known: HashMap<Node, NodeId>,
}

impl Graph {
    fn add(&mut self, node: Node) -> NodeId {
        if let Some(&id) = self.known.get(&node) {
            return id;
        }
        let id = NodeId(self.nodes.len());
        self.nodes.push(node);
        self.known.insert(node, id);
        id
    }

    /// Ends with a `SECCOMP_RET_*` value.
    pub fn ret(&mut self, value: u32) -> NodeId {
        self.add(Node::Ret(value))
    }

    /// A load or mask, then `next`.
    pub fn step(&mut self, code: u16, k: u32, next: NodeId) -> NodeId {
        self.add(Node::Step { code, k, next })
    }

    /// A comparison; none when both ways lead to the same place.
    pub fn branch(&mut self, code: u16, k: u32, yes: NodeId, no: NodeId) -> NodeId {
        if yes == no {
            return yes;
        }
        self.add(Node::Branch { code, k, yes, no })
    }

    /// Errs once the graph is larger than any program can be.
    pub fn check_size(&self) -> Result<(), TooLarge> {
        if self.nodes.len() > MAX_NODES {
            return Err(TooLarge {
                size: self.nodes.len(),
                limit: bpf::MAX_INSTRUCTIONS,
            });
        }
        Ok(())
    }

    fn node(&self, id: NodeId) -> Node {
        // Ids are only made by `add`; the fallback is the safest verdict.
        self.nodes
            .get(id.0)
            .copied()
            .unwrap_or(Node::Ret(crate::action::RET_KILL_PROCESS))
    }

    /// The first node at or after `id` that is not a load (and mask) of what
    /// the accumulator already holds.
    fn skip_held(&self, mut id: NodeId, held: Held) -> NodeId {
        while let Node::Step { code, k, next } = self.node(id) {
            if code != bpf::LD_W_ABS {
                break;
            }
            if held == Held::Word(k, u32::MAX) {
                id = next;
                continue;
            }
            match self.node(next) {
                Node::Step {
                    code: bpf::AND_K,
                    k: mask,
                    next: after,
                } if held == Held::Word(k, mask) => id = after,
                _ => break,
            }
        }
        id
    }

    /// The same decisions without loads of what is already in the accumulator.
    pub fn without_repeated_loads(&mut self, root: NodeId) -> Result<NodeId, TooLarge> {
        let mut done: HashMap<(NodeId, Held), NodeId> = HashMap::new();
        let mut stack = vec![(root, Held::Unknown)];
        // An explicit stack: a chain may be as long as the program.
        while let Some(&(id, held)) = stack.last() {
            self.check_size()?;
            if done.contains_key(&(id, held)) {
                stack.pop();
                continue;
            }
            let new = match self.node(id) {
                Node::Ret(value) => Some(self.ret(value)),
                Node::Step { code, k, next } => {
                    let after = match (code, held) {
                        (bpf::LD_W_ABS, _) => Held::Word(k, u32::MAX),
                        (bpf::AND_K, Held::Word(offset, mask)) => Held::Word(offset, mask & k),
                        _ => Held::Unknown,
                    };
                    let key = (self.skip_held(next, after), after);
                    match done.get(&key) {
                        Some(&next) => Some(self.step(code, k, next)),
                        None => {
                            stack.push(key);
                            None
                        }
                    }
                }
                Node::Branch { code, k, yes, no } => {
                    let yes = (self.skip_held(yes, held), held);
                    let no = (self.skip_held(no, held), held);
                    match (done.get(&yes), done.get(&no)) {
                        (Some(&yes), Some(&no)) => Some(self.branch(code, k, yes, no)),
                        (None, _) => {
                            stack.push(yes);
                            None
                        }
                        (_, None) => {
                            stack.push(no);
                            None
                        }
                    }
                }
            };
            if let Some(new) = new {
                done.insert((id, held), new);
                stack.pop();
            }
        }
        Ok(done.get(&(root, Held::Unknown)).copied().unwrap_or(root))
    }

    /// What is reachable from `root`, every node after the nodes it leads to.
    fn ends_first(&self, root: NodeId) -> Vec<NodeId> {
        let mut order = Vec::new();
        let mut seen = vec![false; self.nodes.len()];
        let mut stack = vec![(root, false)];
        while let Some((id, expanded)) = stack.pop() {
            if expanded {
                order.push(id);
                continue;
            }
            match seen.get_mut(id.0) {
                Some(seen) if !*seen => *seen = true,
                _ => continue,
            }
            stack.push((id, true));
            match self.node(id) {
                Node::Ret(_) => {}
                Node::Step { next, .. } => stack.push((next, false)),
                // The last one pushed is laid out first, so farthest away.
                Node::Branch { yes, no, .. } => {
                    stack.push((no, false));
                    stack.push((yes, false));
                }
            }
        }
        order
    }

    /// Lays the graph out as a program.
    ///
    /// # Errors
    /// [`TooLarge`] when it is more than seccomp(2) takes.
    pub fn emit(&self, root: NodeId) -> Result<Program, TooLarge> {
        let mut layout = Layout::default();
        for id in self.ends_first(root) {
            match self.node(id) {
                // Verdicts are placed where they are needed.
                Node::Ret(_) if id != root => {}
                Node::Ret(k) => {
                    layout.push(plain(bpf::RET_K, k));
                }
                Node::Step { code, k, next } => {
                    layout.follow(self, next);
                    layout.push(plain(code, k));
                    layout.place(id);
                }
                Node::Branch { code, k, yes, no } => {
                    let (jt, jf) = layout.reach(self, yes, no);
                    layout.push(SockFilter { code, jt, jf, k });
                    layout.place(id);
                }
            }
            if layout.reversed.len() > bpf::MAX_INSTRUCTIONS {
                return Err(TooLarge {
                    size: layout.reversed.len(),
                    limit: bpf::MAX_INSTRUCTIONS,
                });
            }
        }
        layout.reversed.reverse();
        Ok(Program::new(layout.reversed))
    }
}

fn plain(code: u16, k: u32) -> SockFilter {
    SockFilter {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

/// A program under construction, last instruction first.
#[derive(Default)]
struct Layout {
    reversed: Vec<SockFilter>,
    /// How many instructions follow the nearest copy of, or jump to, a node,
    /// counting itself.
    placed: HashMap<NodeId, usize>,
}

impl Layout {
    fn push(&mut self, instruction: SockFilter) {
        self.reversed.push(instruction);
    }

    /// The instruction pushed last is where `id` begins.
    fn place(&mut self, id: NodeId) {
        self.placed.insert(id, self.reversed.len());
    }

    /// How many instructions lie between the one pushed next and `id`.
    fn distance(&self, id: NodeId) -> Option<usize> {
        Some(self.reversed.len() - self.placed.get(&id)?)
    }

    /// Puts a way to `id` right here: its verdict, or a far jump.
    fn bring(&mut self, graph: &Graph, id: NodeId) {
        let instruction = match (graph.node(id), self.distance(id)) {
            (Node::Ret(k), _) => plain(bpf::RET_K, k),
            // Distances are bounded by MAX_INSTRUCTIONS. A node that was never
            // placed cannot happen; killing is the safe answer.
            (_, Some(distance)) => match u32::try_from(distance) {
                Ok(distance) => plain(bpf::JA, distance),
                Err(_) => plain(bpf::RET_K, crate::action::RET_KILL_PROCESS),
            },
            (_, None) => plain(bpf::RET_K, crate::action::RET_KILL_PROCESS),
        };
        self.push(instruction);
        self.place(id);
    }

    /// Makes `id` what the next instruction falls through to.
    fn follow(&mut self, graph: &Graph, id: NodeId) {
        if self.distance(id) != Some(0) {
            self.bring(graph, id);
        }
    }

    /// Offsets to both nodes for the branch that is pushed next.
    fn reach(&mut self, graph: &Graph, yes: NodeId, no: NodeId) -> (u8, u8) {
        // Bringing one nearer pushes the other one instruction away; a second
        // round finds the first within reach, so this ends.
        loop {
            let near = |layout: &Self, id| layout.distance(id).and_then(|d| u8::try_from(d).ok());
            match (near(self, yes), near(self, no)) {
                (Some(jt), Some(jf)) => return (jt, jf),
                (None, _) => self.bring(graph, yes),
                (_, None) => self.bring(graph, no),
            }
        }
    }
}
