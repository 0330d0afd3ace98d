// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/test/rig"
)

// fetchNames asks each URL for its answer, or the name of what went wrong.
const fetchNames = `
import sys, urllib.request, socket
socket.setdefaulttimeout(4)
for url in sys.argv[1:]:
    try: print(urllib.request.urlopen(url).read().decode().strip())
    except Exception as e: print(type(getattr(e, "reason", e)).__name__)
`

func (n *node) fetch(box string, urls ...string) []string {
	n.t.Helper()
	return strings.Split(n.must(append([]string{"exec", box, "python3", "-c", fetchNames}, urls...)...), "\n")
}

// TestNames: a sandbox reaches what the names of its policy resolve to, under
// that name only once it was resolved, and nothing else; a name that no rule
// allows never leaves the node.
func TestNames(t *testing.T) {
	n := open(t)
	box := n.start("named", "names", python)
	api := "http://" + rig.API4.String() + "/"
	if got := n.fetch("named", api); got[0] != "TimeoutError" {
		t.Errorf("before the name is resolved its address answers %q", got[0])
	}
	got := n.fetch("named", "http://api.example.com/", "http://large.models.example.com/", api, "http://["+rig.API6.String()+"]/",
		"http://far.example.com/", "http://secret.exfil.example.org/", "http://a.large.models.example.com/", "http://rebind.example.com/", "http://private.example.com/")
	for i, want := range []string{"hello", "hello", "hello", "hello", "gaierror", "gaierror", "gaierror", "gaierror", "gaierror"} {
		if !strings.Contains(got[i], want) {
			t.Errorf("fetch %d: %q, want %s", i, got[i], want)
		}
	}
	for _, name := range []string{"far.example.com", "secret.exfil.example.org", "a.large.models.example.com"} {
		if k := n.Net.Asked(name); k != 0 {
			t.Errorf("%s was asked for %d times upstream", name, k)
		}
	}
	if n.Net.Asked("api.example.com") == 0 {
		t.Error("api.example.com was never asked for upstream")
	}
	// Another port of a learned address, and another resolver.
	for _, target := range []string{rig.API4.String() + ":443", rig.Resolver.String()} {
		if reached, err := rig.DialFrom(box.Sandbox.Pid, target, 300*time.Millisecond); err != nil || reached {
			t.Errorf("%s is reached: %t, %v", target, reached, err)
		}
	}

	for target, wants := range map[string][]string{
		"api.example.com:80":      {"ALLOW", "model-api", rig.API4.String()},
		"far.example.com:80":      {"DENY", "no rule"},
		rig.API4.String() + ":80": {"ALLOW", "model-api"},
	} {
		out := n.must("explain", "named", target)
		for _, want := range wants {
			if !strings.Contains(out, want) {
				t.Errorf("explain %s has no %q:\n%s", target, want, out)
			}
		}
	}
	if out := n.must("policy", "status", "named"); !strings.Contains(out, "api.example.com") || !strings.Contains(out, rig.API4.String()) {
		t.Errorf("policy status does not show what was learned:\n%s", out)
	}
	if out := n.must("flows", "named"); !strings.Contains(out, "secret.exfil.example.org") || !strings.Contains(out, "api.example.com") {
		t.Errorf("the flow log does not show the lookups:\n%s", out)
	}

	// The agent's death changes nothing for what was learned; the next one
	// resolves again.
	if err := n.KillAgent(); err != nil {
		t.Fatal(err)
	}
	if reached, err := rig.DialFrom(box.Sandbox.Pid, rig.API4.String()+":80", time.Second); err != nil || !reached {
		t.Errorf("with no agent a learned address is not reached: %v", err)
	}
	if err := n.StartAgent(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is adopted", func() bool { return strings.Contains(n.get("named").kinds(), "adopted") })
	if got := n.fetch("named", api, "http://api.example.com/"); !strings.Contains(got[0], "hello") || !strings.Contains(got[1], "hello") {
		t.Errorf("after a restart of the agent: %q", got)
	}
	if out := n.must("policy", "status", "named"); !strings.Contains(out, "large.models.example.com") {
		t.Errorf("after a restart a name is forgotten:\n%s", out)
	}

	// A rule that goes takes what its names have opened with it.
	n.rewrite("names.yaml", "{fqdn: api.example.com}, ", "")
	if got := n.fetch("named", "http://api.example.com/", "http://large.models.example.com/"); got[0] != "gaierror" || !strings.Contains(got[1], "hello") {
		t.Errorf("after its rule is gone: %q", got)
	}
	n.rewrite("names.yaml", `{fqdn: "*.models.example.com"}, `, "")
	if got := n.fetch("named", api); got[0] != "TimeoutError" {
		t.Errorf("after all rules for its names are gone an address answers %q", got[0])
	}
}

// rewrite changes a tenant's file, puts it in force, and back when the test is
// over.
func (n *node) rewrite(file, from, to string) {
	n.t.Helper()
	path := filepath.Join(n.TenantsDir, file)
	old, err := os.ReadFile(path)
	if err != nil {
		n.t.Fatal(err)
	}
	if !strings.Contains(string(old), from) {
		n.t.Fatalf("%s does not hold %q:\n%s", file, from, old)
	}
	write := func(text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			n.t.Fatal(err)
		}
		n.must("reload")
	}
	n.t.Cleanup(func() { write(string(old)) })
	write(strings.Replace(string(old), from, to, 1))
}
