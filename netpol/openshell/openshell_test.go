// SPDX-License-Identifier: Apache-2.0

package openshell

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/bulkheadhq/bulkhead/netpol"
)

var update = flag.Bool("update", false, "write the golden files anew")

// golden compares with a file of testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}

func TestImport(t *testing.T) {
	data, err := os.ReadFile("testdata/agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		golden string
		opts   Options
		rules  int
	}{
		{"agent.strict", Options{}, 5},
		{"agent.loose", Options{IgnoreBinaries: true, IgnoreAllowedIPs: true}, 8},
	} {
		out, notes, err := tt.opts.Import("agent.yaml", data)
		if err != nil {
			t.Fatal(err)
		}
		p, err := netpol.Parse("p.yaml", out)
		if err != nil {
			t.Fatal(err)
		}
		if got := len(p.Rules); got != tt.rules {
			t.Errorf("%s: got %d rules, want %d", tt.golden, got, tt.rules)
		}
		var b strings.Builder
		b.Write(out)
		for _, n := range notes {
			fmt.Fprintf(&b, "# %s\n", n)
		}
		golden(t, tt.golden, b.String())
	}
}

func TestImportErrors(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"", "p.yaml: is empty"},
		{"a: [", "p.yaml:2: not valid YAML: did not find expected node content"},
		{"network_policies: {}\n", `p.yaml:1: is not an OpenShell policy: it must say "version: 1"`},
		{"version: 2\n", `p.yaml:1: is not an OpenShell policy: it must say "version: 1"`},
		{"version: 1\nnetwork_policies: []\n", "p.yaml:2: network_policies must be a mapping"},
	} {
		_, _, err := Import("p.yaml", []byte(tt.in))
		var e *netpol.Error
		if err == nil || err.Error() != tt.want || !errors.As(err, &e) {
			t.Errorf("%q: got %v, want %s", tt.in, err, tt.want)
		}
	}
}

// What is malformed or unknown is left out, and said.
func TestImportLeavesOut(t *testing.T) {
	for _, tt := range []struct{ policies, want string }{
		{"a: x", "network_policies.a: is not a mapping: left out"},
		{"a: {endpoints: [{host: a.test, port: 1}], binaries: [{path: /**}], when: night}", "network_policies.a.when: is not known and may be a condition: the policy is left out"},
		{"a: {binaries: [{path: /**}]}", "network_policies.a: has no list of endpoints: left out"},
		{"a: {endpoints: [x], binaries: [{path: /**}]}", "network_policies.a.endpoints[0]: is not a mapping: the endpoint is left out"},
		{"a: {endpoints: [{port: 1}], binaries: [{path: /**}]}", "network_policies.a.endpoints[0]: has neither host nor allowed_ips: the endpoint is left out"},
		{"a: {endpoints: [{host: a.test, port: 1, ports: [2]}], binaries: [{path: /**}]}", "network_policies.a.endpoints[0]: has both port and ports: the endpoint is left out"},
		{"a: {endpoints: [{host: a.test, port: 70000}], binaries: [{path: /**}]}", `network_policies.a.endpoints[0]: port "70000" is not a port: the endpoint is left out`},
		{"a: {endpoints: [{host: a.test, port: 1, allowed_ips: [x]}], binaries: [{path: /**}]}", `network_policies.a.endpoints[0]: allowed_ips has "x", which is not a prefix: the endpoint is left out`},
		{"a: {endpoints: [{host: a.test, port: 1, allowed_ips: []}], binaries: [{path: /**}]}", "network_policies.a.endpoints[0]: allowed_ips is not a list of prefixes: the endpoint is left out"},
		{"a: {endpoints: [{host: 203.0.113.1, port: 1, allowed_ips: [10.0.0.0/8]}], binaries: [{path: /**}]}", "network_policies.a.endpoints[0]: 203.0.113.1 is not in its allowed_ips: the endpoint is left out"},
		{"a: {endpoints: [{host: a.test, port: 1}], binaries: [{path: /**, sha256: x}]}", "network_policies.a.binaries: is for ? only, and a policy here cannot tell binaries apart: the policy is left out"},
		{"a: {endpoints: [{host: a.test, port: 1, protocol: sql}], binaries: [{path: /**}]}", "network_policies.a.endpoints[0]: protocol sql needs to look into the traffic: the endpoint is left out"},
		{"a: {endpoints: [{host: a.test, port: 1, tls: terminate}], binaries: [{path: /**}]}", "network_policies.a.endpoints[0]: tls terminate needs to look into the traffic: the endpoint is left out"},
	} {
		out, notes, err := Import("p.yaml", []byte("version: 1\nnetwork_policies:\n  "+tt.policies+"\n"))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(out), "rules: []") {
			t.Errorf("%s: got rules:\n%s", tt.policies, out)
		}
		if len(notes) != 1 || notes[0].Line != 3 || strings.TrimPrefix(notes[0].String(), "line 3: ") != tt.want {
			t.Errorf("%s: got %v, want %s", tt.policies, notes, tt.want)
		}
	}
}

// A host is not opened by one endpoint if another allows some requests only.
func TestImportKeepsInspectedHostsOut(t *testing.T) {
	out, notes, err := Import("p.yaml", []byte(`version: 1
network_policies:
  a: {endpoints: [{host: "**.a.test", port: 443}, {host: b.test, port: 443}], binaries: [{path: /**}]}
  b: {endpoints: [{host: api.a.test, port: 443, protocol: rest, access: read-only}], binaries: [{path: /usr/bin/curl}]}
`))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(out), "a.test") || !strings.Contains(string(out), "b.test") || len(notes) != 2 {
		t.Errorf("got %v\n%s", notes, out)
	}
}

func TestMayOverlap(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want bool
	}{
		{"a.test", "a.test", true}, {"a.test", "b.test", false}, {"**.test", "a.test", true}, {"*.test", "b.a.test", true},
		{"api-*.a.test", "**.test", true}, {"**.a.test", "**.b.test", false}, {"*", "a.test", true}, {"*.a.test", "a.test", false},
	} {
		if got := mayOverlap(tt.a, tt.b); got != tt.want {
			t.Errorf("%s and %s: got %v, want %v", tt.a, tt.b, got, tt.want)
		}
		if got := mayOverlap(tt.b, tt.a); got != tt.want {
			t.Errorf("%s and %s: got %v, want %v", tt.b, tt.a, got, tt.want)
		}
	}
}

func FuzzImport(f *testing.F) {
	if data, err := os.ReadFile("testdata/agent.yaml"); err == nil {
		f.Add(data)
	}
	f.Add([]byte("version: 1\nnetwork_policies: {a: {endpoints: [{host: a.test, port: 1}], binaries: [{path: /**}]}}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, o := range []Options{{}, {true, true}} {
			out, _, err := o.Import("p.yaml", data)
			if err != nil {
				continue
			}
			if _, err := netpol.Parse("p.yaml", out); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
		}
	})
}
