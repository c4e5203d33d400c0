"""What the documentation says, made into things that can be checked: blocks that run, links, names.

Everything here is pure but `run`, which runs one document's blocks. `test_docs.py` says what is to hold.

A document is written so:

``<!-- run by CI: NAME -->`` at its top: its blocks marked ``sh`` are run, in their order, by one bash. A person's
terminal is what they are written for, with the default ports. What cannot run everywhere is marked ``console``.
``<!-- file: NAME -->`` before a block: the block is what is to be in that file, where the commands run.
A block marked ``text`` after one marked ``sh`` is what that prints; ``...`` stands for anything in a line, and alone
in a line for any lines.
"""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import tempfile

FENCE = re.compile(r"^(`{3,})\s*(\S*)\s*$")
RUN = re.compile(r"<!-- run by CI: ([\w -]+) -->")
FILE = re.compile(r"<!-- file: (\S+) -->")
#: Seconds for all blocks of one document.
PATIENCE = 120
#: Of what the blocks printed, what a failure shows.
SHOWN_BYTES_MAX = 6000


@dataclasses.dataclass
class Block:
    kind: str
    text: str
    line: int
    #: The file that it is to be written to, if it is one.
    file: str = ""
    #: The block before it, with nothing but white space between.
    follows: int = -1


def blocks(text):
    """All fenced blocks of a document."""
    found, lines, at = [], text.split("\n"), 0
    named, near = "", -1
    while at < len(lines):
        opening = FENCE.match(lines[at])
        if opening is None:
            comment = FILE.search(lines[at])
            if comment:
                named = comment.group(1)
            elif lines[at].strip():
                named, near = "", -1
            at += 1
            continue
        begin = at + 1
        at = begin
        while at < len(lines) and not (lines[at].startswith(opening.group(1)) and not lines[at].strip("` ")):
            at += 1
        found.append(Block(opening.group(2), "\n".join(lines[begin:at]) + "\n", begin + 1, named, near))
        named, near = "", len(found) - 1
        at += 1
    return found


def prose(text):
    """The document without its blocks, line by line as long as it was."""
    lines = text.split("\n")
    for block in blocks(text):
        begin = block.line - 2
        for at in range(begin, min(begin + block.text.count("\n") + 2, len(lines))):
            lines[at] = ""
    return "\n".join(lines)


def runs(text):
    """The name of the run, if CI is to run the document's blocks."""
    found = RUN.search(text)
    return found and found.group(1)


def pattern(expected):
    """What a text that may have ``...`` in it fits."""
    parts = []
    for line in expected.rstrip("\n").split("\n"):
        if line.strip() == "...":
            parts.append(r"(?:.*\n)*?")
        else:
            parts.append(r".*?".join(re.escape(piece) for piece in line.rstrip().split("...")) + r"[ \t]*\n")
    return re.compile("".join(parts) + r"\Z")


def expectations(found):
    """``(number of the block that prints, the text, its line)`` for each text that follows what runs."""
    for block in found:
        if block.kind == "text" and block.follows >= 0 and found[block.follows].kind == "sh":
            yield block.follows, block.text, block.line


def script(found):
    """One bash program of all blocks that run: what each prints goes to a file of its own."""
    parts = ["set -euo pipefail"]
    for number, block in enumerate(found):
        if block.file:
            parts.append(f"cat > {block.file} <<'END OF THE FILE'\n{block.text}END OF THE FILE")
        elif block.kind == "sh":
            parts.append(f'exec > "$DOCS_SAID/{number}.out" 2> "$DOCS_SAID/{number}.err"\n{block.text}')
    return "\n".join(parts) + "\n"


#: As a machine has it: loopback, and an address that others could reach (one kept for documentation, RFC 5737). Nodes
#: tell others where they are by the latter.
NETWORK = "ip link set lo up && ip address add 192.0.2.1/32 dev lo"


def isolation():
    """What to begin a bash program with so that it has the machine's ports for itself; None where that may not be."""
    command = ["unshare", "-rn"]
    try:
        done = subprocess.run([*command, "bash", "-c", NETWORK], capture_output=True)
    except FileNotFoundError:
        return None
    return command if done.returncode == 0 else None


def run(name, text, program, root, apart):
    """Runs the document's blocks in a fresh directory. Returns what is wrong, in words; empty: nothing."""
    found = blocks(text)
    # Short, since the paths of sockets are.
    place = tempfile.mkdtemp(prefix="aqdoc-")
    work, home, said, tools = (os.path.join(place, part) for part in ("work", "home", "said", "bin"))
    for directory in (work, home, said, tools):
        os.mkdir(directory, 0o700)
    os.symlink(os.path.abspath(program), os.path.join(tools, "aquifer"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AQUIFER_", "XDG_", "PYTHON"))}
    environment.update(
        HOME=home,
        XDG_RUNTIME_DIR=home,
        DOCS_SAID=said,
        PYTHONPATH=os.path.join(root, "python"),
        PATH=f"{tools}:{environment['PATH']}",
    )
    if "proxy" in " ".join(environment).lower():
        environment.update(NO_PROXY="*", no_proxy="*")
    up = f"{NETWORK}\n" if apart else ""
    child = subprocess.Popen(
        [*apart, "bash", "-c", up + script(found)],
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        # What blocks leave running ends with this group; some of it may stop reading before.
        start_new_session=True,
    )
    try:
        status = child.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        status = f"nothing: it did not end within {PATIENCE} s"
    finally:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # Nothing was left.
        child.wait()
    try:
        return _verdict(name, found, status, said, work)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _verdict(name, found, status, said, work):
    def read(number, which):
        try:
            with open(os.path.join(said, f"{number}.{which}"), encoding="utf-8", errors="replace") as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def shown(number):
        block = found[number]
        return (
            f"{name}: line {block.line}:\n{block.text}---- it printed\n{read(number, 'out')[-SHOWN_BYTES_MAX:]}"
            f"---- and as errors\n{read(number, 'err')[-SHOWN_BYTES_MAX:]}"
        )

    if status != 0:
        begun = [int(file.split(".")[0]) for file in os.listdir(said) if file.endswith(".out")]
        logs = "".join(f"---- {log}\n{_end(os.path.join(work, log))}" for log in sorted(_logs(work)))
        return f"ended with {status} in\n{shown(max(begun))}{logs}" if begun else f"{name}: ended with {status}"
    for number, expected, line in expectations(found):
        if not pattern(expected).match(_ended(read(number, "out"))):
            return f"line {line} shows another text than what came of\n{shown(number)}---- expected\n{expected}"
    return ""


def _ended(text):
    return text if text.endswith("\n") else text + "\n"


def _logs(work):
    for directory, _, files in os.walk(work):
        yield from (os.path.relpath(os.path.join(directory, f), work) for f in files if f.endswith(".log"))


def _end(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()[-SHOWN_BYTES_MAX // 3 :]


# ---- links


def slug(heading):
    """The anchor that a heading gets, as GitHub makes it."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def headings(text):
    return [m.group(2).strip() for m in re.finditer(r"^(#{1,6}) (.+)$", prose(text), re.M)]


def anchors(text):
    found, seen = set(), {}
    for heading in headings(text):
        name = slug(heading)
        found.add(f"{name}-{seen[name]}" if name in seen else name)
        seen[name] = seen.get(name, 0) + 1
    return found


def links(text):
    """``(line, target)`` of each link; code is not looked at."""
    plain = re.sub(r"`[^`]*`", lambda span: "\n" * span.group().count("\n"), prose(text))
    for number, line in enumerate(plain.split("\n"), 1):
        yield from ((number, target) for target in re.findall(r"\]\(([^)\s]+)\)", line))


def broken_links(root, path, text):
    """Those that lead nowhere. ``path`` is the document's, from ``root``."""
    for line, target in links(text):
        if re.match(r"[a-z+]+:", target):
            continue
        there, _, anchor = target.partition("#")
        file = os.path.normpath(os.path.join(root, os.path.dirname(path), there)) if there else os.path.join(root, path)
        if not os.path.exists(file):
            yield f"{path}:{line}: {target}: there is no such file"
        elif anchor and not (file.endswith(".md") and anchor in anchors(_read(file))):
            yield f"{path}:{line}: {target}: nothing there has that anchor"


def _read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


# ---- names


def options_of_help(text):
    """Options and environment variables that a help text names."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text)), set(re.findall(r"\[env:\s+([A-Z_]+)=", text))


def commands_of_help(text):
    part = re.search(r"^Commands:\n((?:  .*\n)+)", text, re.M)
    return re.findall(r"^  ([a-z]+)", part.group(1), re.M) if part else []


def help_of(program):
    """All that the program says of itself: ``(commands, options, environment)``."""
    commands, options, environment, left = set(), set(), set(), [()]
    while left:
        path = left.pop()
        done = subprocess.run([program, "--config", os.devnull, *path, "--help"], capture_output=True, text=True, check=True)
        of_this, env = options_of_help(done.stdout)
        options, environment = options | of_this, environment | env
        for command in commands_of_help(done.stdout):
            if command != "help":
                commands.add((*path, command))
                left.append((*path, command))
    return commands, options | {"--help", "--version"}, environment


def spans(text):
    """``(line, code)`` for each piece of code within a sentence; it may go on in the next line."""
    plain = prose(text)
    for span in re.finditer(r"`([^`]+)`", plain):
        yield plain.count("\n", 0, span.start()) + 1, span.group(1).replace("\n", " ")


def own_code(text):
    """``(line, code)``: what the document gives as code that is the program's: its command lines, whole, and short
    pieces that begin with its name or with an option."""
    for block in blocks(text):
        if block.kind not in ("", "sh", "console"):
            continue
        joined, line = re.sub(r"\\\n", lambda m: " ", block.text), block.line
        for command in joined.split("\n"):
            for piece in re.split(r"\||&&|;|\$\(", command):
                if re.match(r"^[\s#$>]*(?:[A-Z_]+=\S+ )*aquifer( |$)", piece):
                    yield line, re.sub(r"\s+#.*", "", piece)
    yield from ((line, code) for line, code in spans(text) if re.match(r"(aquifer |--)", code))


def unknown_options(path, text, commands, options):
    for line, code in own_code(text):
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", code):
            if option not in options:
                yield f"{path}:{line}: {option}: no help names such an option"
        command = re.search(r"aquifer ([a-z]+)", code)
        if command and (command.group(1),) not in commands | {("help",)}:
            yield f"{path}:{line}: `aquifer {command.group(1)}`: there is no such command"


def unknown_environment(path, text, known):
    for number, line in enumerate(text.split("\n"), 1):
        for name in re.findall(r"\bAQUIFER_[A-Z_]*[A-Z]\b", line):
            if name not in known:
                yield f"{path}:{number}: {name}: nothing reads that"


def metric_names(text):
    """Names in the table of ``docs/metrics.md``."""
    return set(re.findall(r"^\| `(aquifer_\w+)`", text, re.M))


def unknown_metrics(path, text, known, crates=()):
    """A log filter or a path in Rust begins as metrics do: those of ``crates`` are none."""
    for number, line in enumerate(text.split("\n"), 1):
        for name in re.findall(r"(?<![\w:/])aquifer_[a-z0-9_]*[a-z0-9](?![\w:])", line):
            if name not in known | set(crates) and re.sub(r"_(bucket|sum|count)$", "", name) not in known:
                yield f"{path}:{number}: {name}: docs/metrics.md has no such metric"


def alerts(rules):
    """Names of the alerts in a file of Prometheus' rules."""
    return re.findall(r"^\s*- alert:\s*(\w+)", rules, re.M)


def alerts_without_section(rules, operate):
    there = headings(operate)
    yield from (f"docs/operate.md: no section for the alert {name}" for name in alerts(rules) if name not in there)
    known = alerts(rules)
    for heading in there:
        if re.fullmatch(r"Aquifer[A-Z]\w+", heading) and heading not in known:
            yield f"docs/operate.md: '{heading}' is no alert of deploy/prometheus/rules.yml"


def undocumented(names, text, what):
    """Those of ``names`` that the document never gives as code."""
    code = {code for _, code in spans(text)}
    words = code | {word for piece in code for word in re.split(r"[\s?]", piece)}
    yield from (f"the {what} {name} is not documented" for name in names if name not in words)


def unknown_calls(path, text, known):
    for number, line in enumerate(text.split("\n"), 1):
        for call in re.findall(r"(?<![a-z.-])/v1/[a-z.]*[a-z]", line):
            if call not in known:
                yield f"{path}:{number}: {call}: docs/openapi.json has no such call"


def unmarked(path, text):
    """Blocks that look as if they were run, and are not."""
    if not runs(text):
        for block in blocks(text):
            if block.kind == "sh":
                yield f"{path}:{block.line}: a block of sh that nothing runs: mark the document, or the block as console"
