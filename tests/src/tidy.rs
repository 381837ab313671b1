//! Taste as a test: rules of the source tree that a reader would otherwise have to watch for.
//!
//! The checks work on lines of text and know just enough of Rust for that: they skip comments and string
//! literals where it matters. Each rule is a function from a file to complaints, so that the tests below can
//! show every one of them a violation.

use std::fs;
use std::path::{Path, PathBuf};

/// Longest file, in lines.
pub const FILE_LINES_MAX: usize = 700;
/// Longest function, in lines, from `fn` to its closing brace.
pub const FUNCTION_LINES_MAX: usize = 80;

/// Files and functions that are longer than allowed, with their length. They may only shrink, and an entry that
/// is no longer needed is a complaint too. Functions are named `path::function`.
pub const RATCHET: [(&str, usize); 1] =
    [("datapath/src/session/nbd/tests/handshake.rs::every_option_is_answered_as_the_table_says", 85)];

/// Modules of the data path and the floor each is on.
const FLOORS: [(&str, u8); 13] = [
    ("units", 0),
    ("limits", 0),
    ("request", 0),
    ("record", 0),
    ("block_set", 0),
    ("checksum", 0),
    ("memory", 0),
    ("wire", 1),
    ("session", 2),
    ("store", 2),
    ("replica", 2),
    ("engine", 3),
    ("reactor", 4),
];

/// Words that have no place below a folder, and why. They are cut in two here so that this file passes.
const FORBIDDEN: [(&str, &str, &str); 9] = [
    ("", concat!("todo", "!("), "finish it or leave it out"),
    ("", concat!("unimplemented", "!("), "finish it or leave it out"),
    ("", concat!("dbg", "!("), "a leftover of debugging"),
    ("", concat!("FIX", "ME"), "fix it"),
    ("", concat!("XX", "X"), "say what is meant"),
    ("", concat!("HA", "CK"), "say what is meant"),
    ("", concat!("#![", "allow(warnings"), "heed them"),
    ("", concat!("mem::", "transmute"), "there is always another way here"),
    // Tools and system tests that need one are watched by clippy, which asks them for a reason.
    ("datapath/", concat!("thread::", "sleep"), "wait for the condition itself"),
];

/// A source file.
#[derive(Clone, Debug)]
pub struct Source {
    /// Path from the top of the workspace, with slashes.
    pub path: String,
    /// Its text.
    pub text: String,
}

/// Reads all Rust sources of the workspace.
///
/// # Errors
/// When a file or folder cannot be read.
pub fn read_sources(top: &Path) -> std::io::Result<Vec<Source>> {
    let mut sources = Vec::new();
    let mut folders = vec![top.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() && name != "target" && !name.starts_with('.') {
                folders.push(path);
            } else if name.ends_with(".rs") {
                sources.push(Source { path: relative(top, &path), text: fs::read_to_string(&path)? });
            }
        }
    }
    sources.sort_by(|one, other| one.path.cmp(&other.path));
    Ok(sources)
}

/// Everything that is wrong with the sources, one line each.
#[must_use]
pub fn complaints(sources: &[Source], ratchet: &[(&str, usize)]) -> Vec<String> {
    let mut all = Vec::new();
    for source in sources {
        all.extend(check_floors(source));
        all.extend(check_unsafe(source));
        all.extend(check_words(source));
        all.extend(check_characters(source));
        all.extend(check_header(source));
    }
    all.extend(check_lengths(sources, ratchet));
    all
}

/// No module of the data path uses one on a higher floor, and sessions and store do not know each other.
fn check_floors(source: &Source) -> Vec<String> {
    let Some(path) = source.path.strip_prefix("datapath/src/") else { return Vec::new() };
    let module = path.split(['/', '.']).next().unwrap_or_default();
    let Some(floor) = floor_of(module) else {
        let known = module == "lib";
        return if known { Vec::new() } else { vec![format!("{}: {module} is on no floor", source.path)] };
    };
    let mut complaints = Vec::new();
    for (number, line) in code_lines(&source.text) {
        for used in modules_used(&line) {
            let upward = floor_of(used).is_some_and(|other| other > floor);
            let sideways = floor == 2 && used != module && floor_of(used) == Some(2);
            if upward || sideways {
                complaints.push(format!("{}:{number}: {module} must not use {used}", source.path));
            }
        }
    }
    complaints
}

/// The modules that a line names after `crate::`, alone or in braces.
fn modules_used(line: &str) -> Vec<&str> {
    let mut modules = Vec::new();
    for rest in line.split("crate::").skip(1) {
        if let Some(list) = rest.strip_prefix('{') {
            let list = list.split('}').next().unwrap_or_default();
            modules.extend(list.split(',').filter_map(|item| item.trim().split("::").next()));
        } else {
            modules.extend(rest.split(|letter: char| !letter.is_alphanumeric() && letter != '_').next());
        }
    }
    modules
}

fn floor_of(module: &str) -> Option<u8> {
    FLOORS.iter().find(|(name, _)| *name == module).map(|(_, floor)| *floor)
}

/// `unsafe` lives in the reactor, and each block says what must hold.
fn check_unsafe(source: &Source) -> Vec<String> {
    if source.path.starts_with("datapath/src/reactor/") {
        return Vec::new();
    }
    code_lines(&source.text)
        .filter(|(_, line)| words(line).any(|word| word == concat!("un", "safe")))
        .map(|(number, _)| {
            format!("{}:{number}: {} outside of the reactor", source.path, concat!("un", "safe"))
        })
        .collect()
}

fn check_words(source: &Source) -> Vec<String> {
    let mut complaints = Vec::new();
    for (number, line) in source.text.lines().enumerate() {
        for (folder, word, reason) in FORBIDDEN {
            if source.path.starts_with(folder) && line.contains(word) {
                complaints.push(format!("{}:{}: {word}: {reason}", source.path, number + 1));
            }
        }
        if line.trim_start().starts_with(concat!("#[", "ignore")) && !is_run_by_another(line, &source.text) {
            complaints.push(format!(
                "{}:{}: a test that does not run protects nothing",
                source.path,
                number + 1
            ));
        }
    }
    complaints
}

/// A test may be left out of the usual run if it names the one of its file that runs it in a process of its own.
fn is_run_by_another(line: &str, text: &str) -> bool {
    let name = line.split("\"run by ").nth(1).and_then(|rest| words(rest).next());
    name.is_some_and(|name| text.contains(&format!("fn {name}()")))
}

/// Code is ASCII, so that nothing is what it does not look like. Comments may draw, and literals may hold what
/// is for people or for tests, but nothing invisible.
fn check_characters(source: &Source) -> Vec<String> {
    let mut complaints = Vec::new();
    for (number, line) in source.text.lines().enumerate() {
        let code = code_of(line);
        let bad = code.chars().find(|letter| !letter.is_ascii());
        let bad = bad.or_else(|| line.chars().find(|letter| is_invisible(*letter)));
        let bad = bad.or_else(|| {
            let comment = line.trim_start().starts_with("//");
            line.chars().find(|letter| comment && !letter.is_ascii() && !is_drawing(*letter))
        });
        if let Some(letter) = bad {
            complaints.push(format!("{}:{}: the character {letter:?}", source.path, number + 1));
        }
    }
    complaints
}

/// Boxes, blocks, shapes, arrows, signs of arithmetic, dash and ellipsis, micro, middle dot.
fn is_drawing(letter: char) -> bool {
    matches!(letter, '\u{2190}'..='\u{22ff}' | '\u{2500}'..='\u{25ff}')
        || matches!(letter, '\u{2013}' | '\u{2026}' | '\u{b5}' | '\u{b7}' | '\u{d7}')
}

/// Spaces of no width and marks that reorder text.
fn is_invisible(letter: char) -> bool {
    matches!(letter, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// Every file says at its top what it is for. A `tests.rs` is for testing what it stands beside.
fn check_header(source: &Source) -> Vec<String> {
    if source.path.ends_with("/tests.rs") {
        return Vec::new();
    }
    let first = source.text.lines().next().unwrap_or_default();
    let header = first.strip_prefix("//! ").is_some_and(|text| text.len() >= 12);
    if header { Vec::new() } else { vec![format!("{}:1: no header says what this file is for", source.path)] }
}

fn check_lengths(sources: &[Source], ratchet: &[(&str, usize)]) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut used = Vec::new();
    let mut judge = |name: String, lines: usize, limit: usize| {
        let exception = ratchet.iter().find(|(known, _)| *known == name);
        match exception {
            Some((known, granted)) => {
                used.push(*known);
                if lines > *granted {
                    complaints.push(format!("{name}: {lines} lines, and it may only shrink from {granted}"));
                } else if lines <= limit {
                    complaints
                        .push(format!("{name}: {lines} lines: it needs no entry in the ratchet any more"));
                }
            }
            None if lines > limit => complaints.push(format!("{name}: {lines} lines, more than {limit}")),
            None => {}
        }
    };
    for source in sources {
        judge(source.path.clone(), source.text.lines().count(), FILE_LINES_MAX);
        for (function, lines) in functions(&source.text) {
            judge(format!("{}::{function}", source.path), lines, FUNCTION_LINES_MAX);
        }
    }
    for (name, _) in ratchet.iter().filter(|(name, _)| !used.contains(name)) {
        complaints.push(format!("{name}: in the ratchet and nowhere else"));
    }
    complaints
}

/// Names of the functions of a file with their length in lines. Relies on rustfmt: a function ends at the
/// first line that is a closing brace at its own indentation.
fn functions(text: &str) -> Vec<(&str, usize)> {
    let mut found = Vec::new();
    let mut open: Vec<(&str, &str, usize)> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let code = line.trim_start();
        let indent = &line[..line.len() - code.len()];
        if code.trim_end() == "}" && open.last().is_some_and(|(_, at, _)| *at == indent) {
            let (name, _, start) = open.pop().expect("just looked at");
            found.push((name, number - start + 1));
        } else if let Some(name) = function_name(code) {
            // One line, or a declaration without a body, is no matter.
            if !code.ends_with('}') && !code.ends_with(';') {
                open.retain(|(_, at, _)| at.len() < indent.len());
                open.push((name, indent, number));
            }
        }
    }
    found
}

fn function_name(code: &str) -> Option<&str> {
    let at = if code.starts_with("fn ") { 0 } else { code.find(" fn ")? + 1 };
    let head = &code[..at];
    let qualifiers = ["pub", "const", "async", concat!("un", "safe"), "extern", "\"C\""];
    let plain = |word: &str| qualifiers.contains(&word) || word.starts_with("pub(");
    if !head.split_whitespace().all(plain) {
        return None;
    }
    let name = &code[at + 3..];
    let end = name.find(|letter: char| !letter.is_alphanumeric() && letter != '_')?;
    Some(&name[..end])
}

/// Numbered lines without comments and without what stands in double quotes.
fn code_lines(text: &str) -> impl Iterator<Item = (usize, String)> {
    text.lines().enumerate().map(|(number, line)| (number + 1, code_of(line)))
}

fn code_of(line: &str) -> String {
    let mut code = String::with_capacity(line.len());
    let (mut quoted, mut escaped) = (false, false);
    for (at, letter) in line.char_indices() {
        let in_quotes = line[..at].ends_with('\'') && line[at + letter.len_utf8()..].starts_with('\'');
        match letter {
            '"' if !escaped && !in_quotes => quoted = !quoted,
            '/' if !quoted && line[at..].starts_with("//") => break,
            _ if !quoted && !in_quotes => code.push(letter),
            _ => {}
        }
        escaped = quoted && letter == '\\' && !escaped;
    }
    code
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|letter: char| !letter.is_alphanumeric() && letter != '_')
}

fn relative(top: &Path, path: &Path) -> String {
    let inner: PathBuf = path.strip_prefix(top).expect("found below the top").to_owned();
    inner.to_string_lossy().replace('\\', "/")
}

#[cfg(test)]
mod tests {
    use super::{Source, complaints, functions};

    /// What a file with this text is told, without the complaint about a missing header.
    fn about(path: &str, text: &str) -> Vec<String> {
        about_with(path, text, &[])
    }

    fn about_with(path: &str, text: &str, ratchet: &[(&str, usize)]) -> Vec<String> {
        let text = format!("//! A header that says enough.\n{text}");
        complaints(&[Source { path: path.to_owned(), text }], ratchet)
    }

    fn one(path: &str, text: &str, expected: &str) {
        let complaints = about(path, text);
        assert!(complaints.len() == 1 && complaints[0].contains(expected), "{complaints:?}");
    }

    #[test]
    fn upward_and_sideways_imports_are_refused() {
        one("datapath/src/wire/a.rs", "use crate::session::nbd::Nbd;", "wire must not use session");
        one("datapath/src/units.rs", "use crate::{limits::A, store::B};", "units must not use store");
        one("datapath/src/store/map.rs", "    let a = crate::session::b();", "store must not use session");
        one("datapath/src/session/nbd.rs", "use crate::store;", "session must not use store");
        one("datapath/src/engine/a.rs", "use crate::reactor::ring::Ring;", "engine must not use reactor");
        one("datapath/src/newcomer.rs", "", "newcomer is on no floor");
    }

    #[test]
    fn downward_imports_and_mentions_are_fine() {
        let text =
            "use crate::units::Moment;\nuse crate::store::a;\n// crate::reactor\nlet a = \"crate::reactor\";";
        assert_eq!(about("datapath/src/store/a.rs", text), Vec::<String>::new());
        assert_eq!(about("datapath/src/lib.rs", "pub mod reactor;"), Vec::<String>::new());
        assert_eq!(about("ctl/src/a.rs", "use crate::reactor;"), Vec::<String>::new());
    }

    #[test]
    fn unsafe_code_is_confined() {
        let text = concat!("un", "safe { go() }");
        one("datapath/src/engine/a.rs", text, "outside of the reactor");
        assert_eq!(about("datapath/src/reactor/a.rs", text), Vec::<String>::new());
        assert_eq!(about("ctl/src/a.rs", &format!("// {text}")), Vec::<String>::new());
        assert_eq!(about("ctl/src/a.rs", concat!("#![deny(un", "safe_code)]")), Vec::<String>::new());
    }

    #[test]
    fn forbidden_words_are_found() {
        for (_, word, reason) in super::FORBIDDEN {
            one("datapath/src/lib.rs", &format!("    {word}"), reason);
        }
        assert_eq!(about("benches/src/a.rs", concat!("thread::", "sleep(a)")), Vec::<String>::new());
    }

    #[test]
    fn tests_run_or_are_run_by_another() {
        let left_out = |reason: &str| format!("fn a() {{}}\n{}{reason}]\n", concat!("#[", "ignore"));
        one("ctl/src/a.rs", &left_out(""), "protects nothing");
        one("ctl/src/a.rs", &left_out(" = \"slow\""), "protects nothing");
        one("ctl/src/a.rs", &left_out(" = \"run by b in a process of its own\""), "protects nothing");
        assert_eq!(about("ctl/src/a.rs", &left_out(" = \"run by a in a process\"")), Vec::<String>::new());
    }

    #[test]
    fn code_is_what_it_looks_like() {
        assert_eq!(about("ctl/src/a.rs", "// \u{250c}\u{2500}\u{25b6} \u{2264}"), Vec::<String>::new());
        assert_eq!(
            about("ctl/src/a.rs", "let a = (\"\u{e9}\", '\u{2500}'); // \u{b5}"),
            Vec::<String>::new()
        );
        one("ctl/src/a.rs", "let caf\u{e9} = 1;", "the character");
        one("ctl/src/a.rs", "let a = \"\u{202e}\";", "the character");
        one("ctl/src/a.rs", "// caf\u{e9}", "the character");
        one("ctl/src/a.rs", "// \u{1f600}", "the character");
    }

    #[test]
    fn every_file_has_a_header() {
        let source = Source { path: "ctl/src/a.rs".to_owned(), text: "use std::fmt;\n".to_owned() };
        assert!(complaints(&[source], &[])[0].contains("no header"));
        let source = Source { path: "ctl/src/a.rs".to_owned(), text: "//! placeholder\n".to_owned() };
        assert_eq!(complaints(&[source], &[]).len(), 1, "one word is no header");
    }

    #[test]
    fn long_files_and_functions_are_refused() {
        one("ctl/src/a.rs", &"a\n".repeat(700), "701 lines");
        let long = format!("    pub(crate) const fn giant() {{\n{}    }}\n", "        step();\n".repeat(80));
        one("ctl/src/a.rs", &format!("impl A {{\n{long}}}\n"), "ctl/src/a.rs::giant: 82 lines");
        let fits = format!("fn giant(\n) -> A {{\n{}}}\n", "    step();\n".repeat(77));
        assert_eq!(about("ctl/src/a.rs", &fits), Vec::<String>::new());
    }

    #[test]
    fn the_ratchet_only_turns_one_way() {
        let text = "a\n".repeat(799);
        let told = |granted| about_with("ctl/src/a.rs", &text, &[("ctl/src/a.rs", granted)]);
        assert_eq!(told(800), Vec::<String>::new());
        assert!(told(799)[0].contains("may only shrink"));
        assert!(about_with("ctl/src/a.rs", "", &[("ctl/src/a.rs", 800)])[0].contains("no entry"));
        assert!(about_with("ctl/src/a.rs", "", &[("ctl/src/b.rs", 900)])[0].contains("nowhere else"));
    }

    #[test]
    fn functions_are_measured_by_their_indentation() {
        let text = "fn a() {\n    if b {\n    }\n}\nimpl C {\n    fn d(\n        e: F,\n    ) -> G {\n        fn h() {\n        }\n    }\n    fn i(&self);\n}\n";
        assert_eq!(functions(text), [("a", 4), ("h", 2), ("d", 6)]);
    }
}
