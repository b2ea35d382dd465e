//! `casemate report`: the node at a glance, as one HTML file that needs nothing else:
//! no script, no picture, no style sheet from elsewhere.

mod facts;
mod html;
mod lights;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use casemate_posture::{Depth, Deviation};
use clap::Args;
use futures::stream::{self, StreamExt};
use serde_json::Value;
use tokio::time::timeout;

use crate::clock;
use crate::error::{RunError, Step};
use crate::inspect;
use crate::operator::{self, AT_ONCE, Operator, Pod};
use crate::out;
use crate::paint::plain;
use crate::posture;
use crate::progress::Progress;
use crate::ps;
use facts::{Bar, Figures};
use html::Page;
use lights::State;

/// Help text.
pub const EXAMPLES: &str = "\
Examples:
  casemate report --html node.html
  casemate report --html node.html --bench bench.json    with figures of casemate bench
  casemate report --html - | ssh HOST 'cat > node.html'

Of each pod: its locks as lights, green if all of its processes are as promised, red if
something is not, grey where it has none; what its containers use; what was refused in
the last hour. The file needs nothing else and runs no script. No process is stopped for
it. Exit status: 0, or 125 if casemate itself failed.";

/// For the answers of one pod.
const EACH: Duration = Duration::from_secs(8);
/// Pods, and refusals, on a page that somebody reads.
const PODS: usize = 200;
const REFUSALS: usize = 100;
/// What is recent, in seconds.
const RECENT: u64 = 3600;
/// The largest file of figures.
const LARGEST: u64 = 16 * 1024 * 1024;

/// What to write, and where.
#[derive(Debug, Args)]
pub struct Report {
    /// The file; - for standard output
    #[arg(long, value_name = "FILE")]
    html: PathBuf,
    /// Figures of casemate bench or make bench, as JSON
    #[arg(long, value_name = "FILE")]
    bench: Option<PathBuf>,
}

/// A pod, as far as it answers.
struct Told {
    pod: Pod,
    said: Result<Said, String>,
}

struct Said {
    inspected: Value,
    denials: Value,
    deviations: Vec<Deviation>,
}

/// Looks and writes.
pub fn run(options: &Report) -> Result<i32, RunError> {
    operator::needs_root("report")?;
    let figures = match &options.bench {
        Some(path) => read_figures(path)?,
        None => Vec::new(),
    };
    let pods = operator::pods()?;
    let count = pods.len();
    let progress = Progress::of(count.min(PODS) as u64, "pod");
    let pods: Vec<Pod> = pods.into_iter().take(PODS).collect();
    let asked = operator::block_on(asked(&pods))?;
    let mut told = Vec::new();
    for (pod, said) in pods.into_iter().zip(asked) {
        progress.step(&plain(&pod.id));
        let said = said.and_then(|said| say(&pod, said));
        let said = said.map_err(|error| error.to_string());
        told.push(Told { pod, said });
    }
    drop(progress);
    let page = page(&told, &operator::refusals(), count, &figures, clock::now());
    if options.html == Path::new("-") {
        out::say(page)?;
    } else {
        fs::write(&options.html, page).step("write", options.html.display())?;
    }
    Ok(0)
}

type Answer = Result<(Value, Value), RunError>;

/// What all shims say, in order; one that is stuck holds up no other.
async fn asked(pods: &[Pod]) -> Result<Vec<Answer>, RunError> {
    let each = stream::iter(pods).map(async |pod| {
        timeout(EACH, ask(pod)).await.unwrap_or_else(|_| {
            Err(RunError::Shim {
                step: "ask",
                reason: format!("no answer within {} s", EACH.as_secs()),
            })
        })
    });
    Ok(each.buffered(AT_ONCE).collect().await)
}

/// The same, and how that is.
fn say(pod: &Pod, (inspected, denials): (Value, Value)) -> Result<Said, RunError> {
    let (_, found) = posture::compared(pod, Depth::Glance)?;
    Ok(Said {
        inspected,
        denials,
        deviations: found.deviations,
    })
}

async fn ask(pod: &Pod) -> Result<(Value, Value), RunError> {
    let inspected = inspect::whole(pod).await?;
    let shim = Operator::connect(pod).await?;
    let denials = shim.denials().await?;
    Ok((inspected, denials))
}

fn read_figures(path: &Path) -> Result<Vec<Figures>, RunError> {
    let shown = path.display();
    let size = fs::metadata(path).step("read", shown)?.len();
    let text = match size {
        0..LARGEST => fs::read(path).step("read", path.display())?,
        _ => Vec::new(),
    };
    let bench: Value = serde_json::from_slice(&text).unwrap_or_default();
    let figures = facts::figures(&bench);
    if figures.is_empty() {
        return Err(RunError::Refused(format!(
            "read {}: no figures in it; casemate bench --json FILE makes such a file",
            path.display()
        )));
    }
    Ok(figures)
}

fn page(told: &[Told], refusals: &[Value], count: usize, figures: &[Figures], now: u64) -> String {
    let mut page = Page::default();
    page.markup(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta http-equiv=\"Content-Security-Policy\" \
         content=\"default-src 'none'; style-src 'unsafe-inline'\">\
         <title>casemate: this node</title><style>",
    )
    .markup(include_str!("page.css"))
    .markup("</style></head><body>\n<h1>casemate on ")
    .text(rustix::system::uname().nodename().to_string_lossy())
    .markup("</h1>\n<p>")
    .text(clock::rfc3339(now))
    .markup(" · release ")
    .text(env!("CARGO_PKG_VERSION"))
    .markup(" · Linux ")
    .text(rustix::system::uname().release().to_string_lossy())
    .markup(" · pods: ")
    .number(count as u64)
    .markup("</p>\n<h2>Pods and their locks</h2>\n");
    if told.is_empty() {
        page.markup("<p>No pod lives on this node.</p>\n");
    }
    for one in told {
        card(&mut page, one);
    }
    if count > told.len() {
        page.markup("<p>and more: ")
            .number((count - told.len()) as u64)
            .markup("</p>\n");
    }
    refused(&mut page, told, refusals, now);
    page.markup("<h2>System calls in reach, x86-64</h2>\n");
    bars(&mut page, &facts::reachable());
    page.markup("<h2>Entries of all ABIs</h2>\n");
    bars(&mut page, &facts::entries());
    page.markup(
        "<p>By evaluating the installed filters for every number. gVisor answers its \
         workloads itself; what is counted is what it may call on the host.</p>\n",
    );
    if !figures.is_empty() {
        measured(&mut page, figures);
    }
    page.markup("</body></html>\n");
    page.finish()
}

fn card(page: &mut Page, told: &Told) {
    let pod = &told.pod;
    page.markup("<section class=\"card\"><div class=\"name\">");
    match &pod.kubernetes {
        Some((namespace, name)) => page.text(namespace).markup("/").text(name),
        None => page.text(&pod.id),
    };
    page.markup("</div><p>")
        .text(&pod.id)
        .markup(" · since ")
        .text(whole_seconds(&pod.since))
        .markup("</p>");
    let said = match &told.said {
        Ok(said) => said,
        Err(error) => {
            page.markup("<p class=\"wrong\">")
                .text(error)
                .markup("</p></section>\n");
            return;
        }
    };
    page.markup("<ul class=\"lights\">");
    for light in lights::row(&said.deviations, &said.inspected) {
        page.markup(match light.state {
            State::Good => "<li class=\"good\" title=\"as promised\">",
            State::Bad => "<li class=\"bad\" title=\"not as promised\">",
            State::Absent => "<li class=\"off\" title=\"this pod has none\">",
        })
        .text(light.name)
        .markup("</li>");
    }
    page.markup("</ul>");
    for deviation in &said.deviations {
        page.markup("<p class=\"wrong\">")
            .text(deviation.to_string())
            .markup("</p>");
    }
    containers(page, &said.inspected);
    page.markup("</section>\n");
}

/// A time without fractions of a second.
fn whole_seconds(time: &str) -> String {
    match time.split_once('.') {
        Some((seconds, _)) => format!("{seconds}Z"),
        None => time.to_owned(),
    }
}

fn containers(page: &mut Page, inspected: &Value) {
    page.markup(
        "<div class=\"wide\"><table><tr><th>container</th><th>state</th><th>profile</th>\
         <th>memory</th><th>processes</th><th>refused calls</th></tr>",
    );
    let all = inspected["containers"].as_array().into_iter().flatten();
    for container in all.filter(|container| container["pause"] != true) {
        let sandbox = &container["sandbox"];
        let usage = &sandbox["usage"];
        let word = |value: &Value| match value {
            Value::String(text) => text.clone(),
            Value::Null => "-".to_owned(),
            other => other.to_string(),
        };
        let memory = usage["memory"].as_u64().map_or("-".to_owned(), ps::bytes);
        page.markup("<tr>");
        for cell in [
            word(&container["id"]),
            word(&container["state"]),
            word(&sandbox["profile"]),
            memory,
            word(&usage["processes"]),
            word(&container["denied"]),
        ] {
            page.markup("<td>").text(cell).markup("</td>");
        }
        page.markup("</tr>");
    }
    page.markup("</table></div>");
}

/// Refused calls that were last seen within the hour, and refused requests.
fn refused(page: &mut Page, told: &[Told], refusals: &[Value], now: u64) {
    let recent = |at: &Value| {
        let then = at.as_str().and_then(clock::seconds);
        then.is_some_and(|then| now.saturating_sub(then) <= RECENT)
    };
    let mut rows: Vec<[String; 4]> = Vec::new();
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    for one in told {
        let Ok(said) = &one.said else { continue };
        let name = match &one.pod.kubernetes {
            Some((namespace, name)) => format!("{namespace}/{name}"),
            None => one.pod.id.clone(),
        };
        let denials = said.denials["denials"].as_array().into_iter().flatten();
        for denial in denials.filter(|denial| recent(&denial["last"])) {
            let what = format!(
                "{}x {} {}",
                denial["count"],
                text(&denial["syscall"]),
                text(&denial["class"])
            );
            rows.push([
                whole_seconds(&text(&denial["last"])),
                name.clone(),
                what,
                text(&denial["reason"]),
            ]);
        }
    }
    for refusal in refusals {
        if recent(&refusal["at"]) {
            let rule = format!("request, by {}", text(&refusal["rule"]));
            rows.push([
                whole_seconds(&text(&refusal["at"])),
                text(&refusal["pod"]),
                rule,
                text(&refusal["text"]),
            ]);
        }
    }
    rows.sort_by(|a, b| b[0].cmp(&a[0]));
    page.markup("<h2>Refused in the last hour</h2>\n");
    if rows.is_empty() {
        page.markup("<p>Nothing was refused.</p>\n");
        return;
    }
    page.markup(
        "<div class=\"wide\"><table><tr><th>last</th><th>pod</th><th>what</th><th>why</th></tr>",
    );
    for row in rows.iter().take(REFUSALS) {
        page.markup("<tr>");
        for cell in row {
            page.markup("<td>").text(cell).markup("</td>");
        }
        page.markup("</tr>");
    }
    page.markup("</table></div>\n");
    if rows.len() > REFUSALS {
        page.markup("<p>and more: ")
            .number((rows.len() - REFUSALS) as u64)
            .markup("</p>\n");
    }
}

fn bars(page: &mut Page, bars: &[Bar]) {
    let most = bars.iter().map(|(_, n)| *n).max().unwrap_or(1).max(1);
    page.markup("<table class=\"bars\">");
    for (name, n) in bars {
        bar(page, name, &n.to_string(), n * 1000 / most);
    }
    page.markup("</table>\n");
}

/// A row with a bar of so many thousandths.
fn bar(page: &mut Page, name: &str, shown: &str, thousandths: u64) {
    page.markup("<tr><td>")
        .text(name)
        .markup("</td><td>")
        .text(shown)
        .markup(
            "</td><td><svg viewBox=\"0 0 1000 10\" preserveAspectRatio=\"none\" \
             aria-hidden=\"true\"><rect height=\"10\" width=\"",
        )
        .number(thousandths)
        .markup("\"/></svg></td></tr>");
}

fn measured(page: &mut Page, figures: &[Figures]) {
    page.markup("<h2>Measured: medians</h2>\n");
    for (name, medians) in figures {
        page.markup("<p>")
            .text(name)
            .markup("</p><table class=\"bars\">");
        let most = medians.iter().map(|(_, value)| *value).fold(0.0, f64::max);
        for (runtime, value) in medians {
            let share = if most > 0.0 { value / most } else { 0.0 };
            // Between 0 and 1000.
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let thousandths = (share.clamp(0.0, 1.0) * 1000.0) as u64;
            bar(page, runtime, &format!("{value:.2}"), thousandths);
        }
        page.markup("</table>\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const HOSTILE: &str = "<script>alert(1)</script>\"'&";

    fn told(said: Result<Said, String>) -> Told {
        Told {
            pod: Pod::of_test(HOSTILE),
            said,
        }
    }

    #[test]
    fn what_a_pod_is_called_is_no_markup_anywhere() {
        let deviation = Deviation {
            what: format!("container {HOSTILE}: mount {HOSTILE}"),
            promised: HOSTILE.into(),
            found: HOSTILE.into(),
        };
        let said = Said {
            inspected: json!({ "containers": [{
                "id": HOSTILE, "state": HOSTILE, "sandbox": { "profile": HOSTILE },
            }] }),
            denials: json!({ "denials": [{
                "last": "2024-02-29T23:59:59.0Z", "syscall": HOSTILE, "class": HOSTILE,
                "reason": HOSTILE, "count": 1,
            }] }),
            deviations: vec![deviation],
        };
        let figures = vec![(HOSTILE.to_owned(), vec![(HOSTILE.to_owned(), 1.5)])];
        let all = [told(Ok(said)), told(Err(HOSTILE.to_owned()))];
        let page = page(&all, &[], 3, &figures, 1_709_251_200);
        assert!(!page.contains("<script"), "{page}");
        assert!(page.matches("&lt;script&gt;").count() >= 12, "{page}");
        for part in ["class=\"bad\"", "and more: 1", "Measured", "gVisor"] {
            assert!(page.contains(part), "{part}");
        }
        // From nowhere else.
        for part in ["http:", "https:", "src=", "href=", "url("] {
            assert!(!page.contains(part), "{part} in the page");
        }
    }

    #[test]
    fn an_hour_ago_is_not_recent() {
        let said = |last: &str| Said {
            inspected: json!({}),
            denials: json!({ "denials": [{ "last": last, "syscall": "mount", "count": 7 }] }),
            deviations: Vec::new(),
        };
        let now = 1_709_251_200;
        let one = |last| page(&[told(Ok(said(last)))], &[], 1, &[], now);
        assert!(one("2024-02-29T23:30:00.0Z").contains("7x mount"));
        assert!(!one("2024-02-29T22:30:00.0Z").contains("7x mount"));
        assert!(!one("yesterday").contains("7x mount"));
    }
}
