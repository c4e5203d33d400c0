"""What must hold of deploy/. Each check takes a directory like deploy/ and returns what is wrong with it, in words;
the tests give it the real one, and copies with a mistake in them.

Tools: promtool, systemd-analyze, kubectl (its kustomize), and what requirements.txt names.
"""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
DEPLOY = os.path.join(ROOT, "deploy")
PROGRAM = os.environ.get("AQUIFER_BIN", os.path.join(ROOT, "target", "release", "aquifer"))
METRICS = os.path.join(ROOT, "docs", "metrics.md")
OPENAPI = os.path.join(ROOT, "docs", "openapi.json")
RUNBOOK = os.path.join(ROOT, "docs", "operate.md")

#: The most exposure that `systemd-analyze security` may see, of 10.
EXPOSURE_MOST = 3.0
#: The oldest Kubernetes that the manifests are for (native sidecars), and the newest whose schemas are at hand.
KUBERNETES = ("1.29", "1.37")
#: kubectl's kustomize before this does not know `patches` and `labels`.
KUSTOMIZE_LEAST = (5, 0)
OVERLAYS = ("base", "overlays/rdma", "overlays/sidecar", "overlays/keda", "overlays/hpa")
#: What Prometheus itself puts on every series.
LABELS_OF_PROMETHEUS = {"job", "instance", "le", "node", "namespace"}
#: Seconds of --drain-grace.
DRAIN_GRACE_S = 25
#: Keys that Grafana reads and its SDK does not know.
UNKNOWN_TO_SDK = re.compile(
    r"^/(annotations/list/\d+/(builtIn|titleFormat|textFormat|step)|templating/list/\d+/definition)$"
)


def run(command, **more):
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more
    )


def missing(*programs):
    """The reason to skip what needs these, or None."""
    absent = [program for program in programs if shutil.which(program) is None]
    return f"{', '.join(absent)} not installed" if absent else None


def schema_problems(schema, value, what):
    import jsonschema

    validator = jsonschema.Draft202012Validator(schema)
    return [f"{what}: {'/'.join(map(str, e.absolute_path))}: {e.message[:300]}" for e in validator.iter_errors(value)]


# --- YAML


def yaml_problems(deploy):
    done = run(
        [sys.executable, "-m", "yamllint", "-s", "-f", "parsable", "-c", os.path.join(HERE, "yamllint.yaml"), deploy]
    )
    return done.stdout.splitlines() if done.returncode else []


# --- the program's options


def options():
    """The program's long options, by what it says itself; None if it is not built."""
    if not os.path.exists(PROGRAM):
        return None
    found = set()
    for command in ("agent", "drain"):
        said = run([PROGRAM, command, "--help"])
        if said.returncode:
            raise RuntimeError(f"{PROGRAM} {command} --help: {said.stdout}")
        found |= set(re.findall(r"--[a-z][a-z-]+", said.stdout))
    return found


def option_problems(deploy):
    """Environment variables, flags and TOML keys that the program does not know."""
    known = options()
    variables = {"AQUIFER_" + option[2:].upper().replace("-", "_") for option in known}
    problems = []
    for directory, _, files in os.walk(deploy):
        for name in files:
            path = os.path.join(directory, name)
            with open(path) as file:
                # What a comment names is an option too.
                text = file.read()
            for variable in re.findall(r"\bAQUIFER_[A-Z_]+\b(?!\.\.\.)", text):
                if variable not in variables:
                    problems.append(f"{path}: {variable}: the program has no such option")
            for line in text.splitlines():
                if re.match(r"ExecStart=/usr/bin/aquifer", line):
                    problems += [
                        f"{path}: {flag}: no such option"
                        for flag in re.findall(r"--[a-z-]+", line)
                        if flag not in known
                    ]
            if name.endswith(".toml"):
                keys = re.findall(r"^([a-z-]+) *=", text, re.MULTILINE)
                problems += [f"{path}: {key}: no such option" for key in keys if f"--{key}" not in known]
    return problems


# --- the program's HTTP


def http_problems(deploy):
    """Paths and fields that probes and autoscalers ask for, and docs/openapi.json does not have."""
    with open(OPENAPI) as file:
        text = file.read()
    paths, problems = json.loads(text)["paths"], []
    for directory, _, files in os.walk(os.path.join(deploy, "kubernetes")):
        for name in files:
            path = os.path.join(directory, name)
            with open(path) as file:
                content = file.read()
            asked = re.findall(r'httpGet: \{.*?path: "?(/[^",? }]*)', content) + re.findall(
                r":7404(/[^? \n]*)", content
            )
            problems += [f"{path}: the agent has no {one}" for one in asked if one not in paths]
            fields = re.findall(r"valueLocation: (\w+)", content)
            problems += [f"{path}: no answer has {field}" for field in fields if f'"{field}"' not in text]
    return problems


# --- systemd


def systemd_problems(deploy, drop_ins=()):
    """The unit, with these examples of drop-ins put in force."""
    with tempfile.TemporaryDirectory() as place:
        unit = os.path.join(place, "aquifer.service")
        with open(os.path.join(deploy, "systemd", "aquifer.service")) as text:
            content = text.read()
        # The program need not be installed where this is checked.
        with open(unit, "w") as out:
            out.write(content.replace("/usr/bin/aquifer", "/bin/true"))
        for drop_in in drop_ins:
            os.makedirs(unit + ".d", exist_ok=True)
            with open(os.path.join(deploy, "systemd", "aquifer.service.d", drop_in)) as text:
                content = text.read()
            with open(os.path.join(unit + ".d", drop_in.removesuffix(".example")), "w") as out:
                out.write(content.replace("/usr/bin/aquifer", "/bin/true"))
        verified = run(["systemd-analyze", "verify", unit])
        # Warnings, as of a directive that it does not know, leave the status 0.
        problems = [line for line in verified.stdout.splitlines() if "aquifer.service" in line or place in line]
        if verified.returncode and not problems:
            problems.append(verified.stdout)
        threshold = f"--threshold={int(EXPOSURE_MOST * 10)}"
        secure = run(["systemd-analyze", "security", "--offline=true", "--no-pager", threshold, unit])
        if secure.returncode:
            problems.append(f"more exposed than {EXPOSURE_MOST}: {secure.stdout.strip().splitlines()[-1]}")
        return problems


def exposure(deploy):
    """As a number, for people."""
    unit = os.path.join(deploy, "systemd", "aquifer.service")
    said = run(["systemd-analyze", "security", "--offline=true", "--no-pager", unit]).stdout
    return float(re.search(r"exposure level for \S+: ([0-9.]+)", said)[1])


# --- Prometheus


def prometheus_problems(deploy):
    import yaml

    source = os.path.join(deploy, "prometheus")
    problems = []
    with tempfile.TemporaryDirectory() as place:
        with open(os.path.join(source, "scrape.yml")) as file:
            config = yaml.safe_load(file)
        # Debian builds promtool without discovery in Kubernetes: that part is compared with a schema of our own,
        # and promtool gets the rest.
        for job in config["scrape_configs"]:
            for block in job.pop("kubernetes_sd_configs", []):
                problems += schema_problems(KUBERNETES_SD, block, f"scrape.yml: {job['job_name']}")
        shutil.copy(os.path.join(source, "rules.yml"), place)
        rest = os.path.join(place, "prometheus.yml")
        with open(rest, "w") as out:
            yaml.safe_dump(config, out)
        for command in (
            ["check", "config", rest],
            ["check", "rules", "--lint=all", "--lint-fatal", os.path.join(source, "rules.yml")],
            ["test", "rules", os.path.join(source, "rules.test.yml")],
        ):
            done = run(["promtool", *command])
            if done.returncode:
                problems.append(f"promtool {' '.join(command[:2])}: {done.stdout[-1500:]}")
    return problems


KUBERNETES_SD = {
    "type": "object",
    "required": ["role"],
    "additionalProperties": False,
    "properties": {
        "role": {"enum": ["pod", "node", "service", "endpoints", "endpointslice", "ingress"]},
        "namespaces": {"type": "object"},
        "selectors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["role"],
                "additionalProperties": False,
                "properties": {"role": {"type": "string"}, "label": {"type": "string"}, "field": {"type": "string"}},
            },
        },
    },
}


def alerts(deploy):
    import yaml

    with open(os.path.join(deploy, "prometheus", "rules.yml")) as file:
        groups = yaml.safe_load(file)["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def alert_problems(deploy):
    """What promtool does not ask of an alert: words, a chapter, and a test of both kinds."""
    import yaml

    with open(os.path.join(deploy, "prometheus", "rules.test.yml")) as file:
        tests = yaml.safe_load(file)["tests"]
    tried = [
        (case["alertname"], bool(case.get("exp_alerts"))) for test in tests for case in test.get("alert_rule_test", [])
    ]
    problems = []
    for name, rule in alerts(deploy).items():
        if rule.get("labels", {}).get("severity") not in ("warning", "critical"):
            problems.append(f"{name}: no severity")
        words = rule.get("annotations", {})
        problems += [f"{name}: no {key}" for key in ("summary", "description") if not words.get(key)]
        if words.get("runbook") != f"docs/operate.md#{name.lower()}":
            problems.append(f"{name}: runbook is not docs/operate.md#{name.lower()}")
        if os.path.exists(RUNBOOK):
            with open(RUNBOOK) as file:
                if not re.search(rf"^#+ {name}$", file.read(), re.MULTILINE):
                    problems.append(f"{name}: docs/operate.md has no heading of that name")
        problems += [
            f"{name}: never shown to {'fire' if fires else 'be silent'}"
            for fires in (True, False)
            if (name, fires) not in tried
        ]
    return problems


# --- metrics, by name and label


def metrics():
    """Name -> labels, as docs/metrics.md has them, which is made from the code."""
    with open(METRICS) as file:
        rows = [line.split("|") for line in file if line.startswith("| `aquifer_")]
    known = {}
    for row in rows:
        name, kind, labels = row[1].strip(" `"), row[2].strip(), set(re.findall(r"`(\w+)`", row[3]))
        suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        known.update({name + suffix: labels for suffix in suffixes})
    return known


def expressions(deploy):
    """Where it stands, and the PromQL: of rules, dashboard, and autoscaling."""
    import yaml

    with open(os.path.join(deploy, "prometheus", "rules.yml")) as file:
        for group in yaml.safe_load(file)["groups"]:
            for rule in group["rules"]:
                yield rule.get("alert") or rule["record"], rule["expr"]
    with open(os.path.join(deploy, "grafana", "aquifer.json")) as file:
        dashboard = json.load(file)
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield f"panel {panel['title']}", target["expr"]
    for note in dashboard["annotations"]["list"]:
        if "expr" in note:
            yield f"annotation {note['name']}", note["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield f"variable {variable['name']}", variable["query"]["query"]
    with open(os.path.join(deploy, "kubernetes", "overlays", "hpa", "prometheus-adapter.yaml")) as file:
        for rule in yaml.safe_load(file)["externalRules"]:
            yield "prometheus-adapter.yaml", rule["seriesQuery"]
            yield "prometheus-adapter.yaml", rule["metricsQuery"]


def metric_problems(deploy):
    known = metrics()
    problems = []
    for where, expr in expressions(deploy):
        # A recorded series (job:aquifer_ready:ratio) has colons before it or behind.
        named = re.findall(r"(?<![\w:])(aquifer_\w+)(?![\w:])(?:\{([^}]*)\})?", expr)
        labels = set()
        for name, selector in named:
            if name not in known:
                problems.append(f"{where}: no metric is called {name}")
                continue
            labels |= known[name]
            wrong = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)) - known[name] - LABELS_OF_PROMETHEUS
            problems += [f"{where}: {name} has no label {label}" for label in sorted(wrong)]
        grouped = re.findall(r"\bby \(([^)]*)\)", expr)
        by = {label.strip() for labels_ in grouped for label in labels_.split(",")} - {""}
        # vLLM's own metrics may have what labels they like.
        if named and "vllm" not in expr:
            problems += [
                f"{where}: nothing there has the label {label}" for label in sorted(by - labels - LABELS_OF_PROMETHEUS)
            ]
    return problems


def promql_problems(deploy):
    """Whether promtool can read every query of the dashboard: as rules, with Grafana's variables filled in."""
    rules = []
    for where, expr in expressions(deploy):
        if where.startswith(("panel", "annotation", "prometheus-adapter")):
            filled = expr.replace("$__rate_interval", "5m").replace("$instance", ".*").replace("$channel", ".*")
            rules.append({"record": f"query_{len(rules)}", "expr": filled})
    with tempfile.TemporaryDirectory() as place:
        path = os.path.join(place, "queries.json")
        with open(path, "w") as out:
            json.dump({"groups": [{"name": "queries", "rules": rules}]}, out)
        done = run(["promtool", "check", "rules", "--lint=none", path])
        return [done.stdout[-1500:]] if done.returncode else []


# --- Grafana


def grafana_problems(deploy):
    with open(os.path.join(deploy, "grafana", "aquifer.json")) as file:
        dashboard = json.load(file)
    with open(os.path.join(DEPLOY, "grafana", "schema.json")) as file:
        problems = schema_problems(json.load(file), dashboard, "aquifer.json")
    if problems:
        return problems
    ids = [panel["id"] for panel in dashboard["panels"]]
    problems += [f"two panels have the id {id_}" for id_ in sorted({i for i in ids if ids.count(i) > 1})]
    taken = {}
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        for cell in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            if cell in taken or cell[0] > 23:
                problems.append(f"panel {panel['title']} lies over {taken.get(cell, 'the edge')}")
                break
            taken[cell] = panel["title"]
    return problems + list(sdk_losses(dashboard))


def sdk_losses(dashboard):
    """Grafana's own types for dashboards (its Foundation SDK) must know all that is there: decoded and encoded
    again, nothing may be gone or other than it was."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    again = json.loads(JSONEncoder().encode(Dashboard.from_json(copy.deepcopy(dashboard))))
    yield from losses(dashboard, again, "")


def losses(before, after, path):
    if isinstance(before, dict):
        for key, value in before.items():
            here = f"{path}/{key}"
            if not isinstance(after, dict) or key not in after:
                if value not in (None, [], {}) and not UNKNOWN_TO_SDK.match(here):
                    yield f"aquifer.json: {here}: Grafana's types do not know it"
            else:
                yield from losses(value, after[key], here)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after)):
            yield from losses(one, other, f"{path}/{index}")
    elif before != after:
        yield f"aquifer.json: {path}: {before!r} is {after!r} to Grafana's types"


# --- Kubernetes


def old_kustomize():
    """Why kubectl here cannot build the overlays, or None."""
    lacking = missing("kubectl")
    if lacking:
        return lacking
    said = run(["kubectl", "version", "--client"]).stdout
    version = re.search(r"Kustomize Version: v(\d+)\.(\d+)", said)
    if version and (int(version[1]), int(version[2])) >= KUSTOMIZE_LEAST:
        return None
    return f"kubectl's kustomize is older than {'.'.join(map(str, KUSTOMIZE_LEAST))}"


def rendered(deploy, overlay):
    """The objects that `kubectl apply -k` would send, with keys made for the purpose."""
    import yaml

    with tempfile.TemporaryDirectory() as place:
        tree = os.path.join(place, "kubernetes")
        shutil.copytree(os.path.join(deploy, "kubernetes"), tree)
        for name in ("mesh.key", "http.token"):
            with open(os.path.join(tree, "base", "secrets", name), "w") as out:
                out.write("not a key\n")
        done = subprocess.run(["kubectl", "kustomize", os.path.join(tree, overlay)], capture_output=True, text=True)
        if done.returncode or done.stderr.strip():
            raise RuntimeError(f"{overlay}: {done.stderr[-1000:]}")
        return [document for document in yaml.safe_load_all(done.stdout) if document]


def kubernetes_problems(deploy, overlay):
    try:
        objects = rendered(deploy, overlay)
    except RuntimeError as error:
        return [str(error)]
    problems = []
    for one in objects:
        problems += [f"{overlay}: {problem}" for problem in object_problems(one)]
    names = {(one["kind"], one["metadata"]["name"]) for one in objects}
    for workload in (one for one in objects if one["kind"] in ("DaemonSet", "Deployment")):
        problems += [f"{overlay}: {workload['metadata']['name']}: {p}" for p in workload_problems(workload, names)]
    labels = [
        one["spec"]["template"]["metadata"]["labels"] for one in objects if one["kind"] in ("DaemonSet", "Deployment")
    ]
    for one in objects:
        selector = {
            "Service": lambda spec: spec["selector"],
            "PodDisruptionBudget": lambda spec: spec["selector"]["matchLabels"],
            "NetworkPolicy": lambda spec: spec["podSelector"]["matchLabels"],
        }.get(one["kind"])
        if selector and not any(selector(one["spec"]).items() <= have.items() for have in labels):
            problems.append(f"{overlay}: {one['kind']} {one['metadata']['name']} selects no pod")
        target = one.get("spec", {}).get("scaleTargetRef")
        if target and (target["kind"], target["name"]) not in names:
            problems.append(f"{overlay}: {one['kind']} scales {target['name']}, which is not there")
    return problems


def object_problems(one):
    import kubernetes_validate

    what = f"{one['kind']} {one['metadata']['name']}"
    if one["apiVersion"].startswith("keda.sh/"):
        with open(os.path.join(HERE, "keda.schema.json")) as file:
            problems = schema_problems(json.load(file), one, what)
        return problems or formula_problems(one, what)
    for version in KUBERNETES:
        try:
            kubernetes_validate.validate(one, version, strict=True)
        except Exception as error:  # its own kinds of error are many
            return [f"{what}, Kubernetes {version}: {str(error).splitlines()[0][:400]}"]
    return []


def formula_problems(scaled, what):
    """A formula names its triggers."""
    formula = scaled["spec"].get("advanced", {}).get("scalingModifiers", {}).get("formula")
    if formula is None:
        return []
    words = set(re.findall(r"[a-z]\w*", formula)) - {"min", "max"}
    return [
        f"{what}: the formula names {word}, which is no trigger"
        for word in sorted(words - {t.get("name") for t in scaled["spec"]["triggers"]})
    ]


def workload_problems(workload, names):
    pod = workload["spec"]["template"]["spec"]
    chosen, have = workload["spec"]["selector"]["matchLabels"], workload["spec"]["template"]["metadata"]["labels"]
    if not chosen.items() <= have.items():
        yield "its selector does not match its own pods"
    if pod.get("automountServiceAccountToken") is not False:
        yield "a token of its account is mounted"
    if pod.get("terminationGracePeriodSeconds", 30) <= DRAIN_GRACE_S + 5:
        yield f"ended before a drain of {DRAIN_GRACE_S} s is over"
    if pod.get("securityContext", {}).get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "no seccomp profile"
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    for volume in volumes.values():
        for kind, key, name in (("Secret", "secret", "secretName"), ("ConfigMap", "configMap", "name")):
            if key in volume and (kind, volume[key][name]) not in names:
                yield f"volume {volume['name']}: there is no {kind} {volume[key][name]}"
    ports = {port["name"] for c in containers(pod) for port in c.get("ports", [])}
    for container in containers(pod):
        for problem in container_problems(container, pod, volumes, ports):
            yield f"container {container['name']}: {problem}"


def containers(pod):
    return [*pod.get("initContainers", []), *pod["containers"]]


#: What a container may add to no capabilities at all: its name and the capability, and why is said in the manifest.
CAPABILITIES = {("directories", "CHOWN"), ("directories", "DAC_READ_SEARCH"), ("agent", "IPC_LOCK")}


def container_problems(container, pod, volumes, ports):
    if not re.match(r"registry\.example/[a-z]+:[0-9.]+$", container["image"]):
        yield f"image {container['image']} is not the placeholder with a version"
    if container.get("restartPolicy", "Always") != "Always":
        yield "is neither a sidecar nor left to the pod"
    security = container.get("securityContext", {})
    if security.get("allowPrivilegeEscalation") is not False or security.get("readOnlyRootFilesystem") is not True:
        yield "may escalate, or write to its root file system"
    capabilities = security.get("capabilities", {})
    if capabilities.get("drop") != ["ALL"]:
        yield "keeps capabilities"
    for added in capabilities.get("add", []):
        if (container["name"], added) not in CAPABILITIES:
            yield f"adds the capability {added}"
    root = {**pod.get("securityContext", {}), **security}.get("runAsUser") == 0
    if capabilities.get("add") and not root:
        yield "adds capabilities to a user that is not root, who does not get them"
    if "requests" not in container.get("resources", {}):
        yield "no resource requests"
    for mount in container.get("volumeMounts", []):
        if mount["name"] not in volumes:
            yield f"mounts {mount['name']}, which is no volume"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        port = container.get(probe, {}).get("httpGet", {}).get("port")
        if isinstance(port, str) and port not in ports:
            yield f"{probe} asks port {port}, which nobody has"
    seen = set()
    for variable in container.get("env", []):
        for used in re.findall(r"\$\((\w+)\)", variable.get("value", "")):
            if used not in seen:
                yield f"{variable['name']} uses {used}, which is not set before it"
        seen.add(variable["name"])


# --- the image


def container_file_problems(deploy):
    path = os.path.join(deploy, "container", "Containerfile")
    done = run([hadolint(), "--no-color", path])
    problems = done.stdout.splitlines() if done.returncode else []
    with open(path) as file:
        text = file.read()
    last = text[text.rindex("\nFROM ") :]
    if not re.search(r"^USER [1-9][0-9]*:[1-9][0-9]*$", last, re.MULTILINE):
        problems.append("the image does not run as a user that is not root, by number")
    for line in ("STOPSIGNAL SIGTERM", 'ENTRYPOINT ["/usr/bin/aquifer"]'):
        if line not in last:
            problems.append(f"no {line}")
    return problems


def hadolint():
    import site

    for place in [*sys.path, site.getuserbase()]:
        path = os.path.join(place, "bin", "hadolint")
        if os.path.exists(path):
            return path
    return shutil.which("hadolint")
