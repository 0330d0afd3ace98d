// SPDX-License-Identifier: Apache-2.0

package tenant

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// dirOf writes files given as name and content in turn.
func dirOf(t *testing.T, files ...string) string {
	t.Helper()
	dir := t.TempDir()
	for i := 0; i < len(files); i += 2 {
		path := filepath.Join(dir, files[i])
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(files[i+1]), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func load(t *testing.T, files ...string) *Set {
	t.Helper()
	s, err := Load(dirOf(t, files...))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func paths(ts []Tenant) []Path {
	var out []Path
	for _, t := range ts {
		out = append(out, t.Path)
	}
	return out
}

func tcp(addr string, port uint16) netpol.Flow {
	return netpol.Flow{Proto: netpol.TCP, Dst: netip.MustParseAddr(addr), Port: port}
}

// TestExamples loads the files that are also the manual.
func TestExamples(t *testing.T) {
	s, err := Load("../deploy/examples/tenants")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]Path{"acme", "acme/vision", "globex", "hooli"}, paths(s.All())); diff != "" {
		t.Errorf("tenants (-want +got):\n%s", diff)
	}
	want := map[Path]Quota{
		"acme":        {CPUMillis: 2000, MemoryBytes: 1 << 30, PIDs: 512, Sandboxes: 8},
		"acme/vision": {CPUMillis: 1000, MemoryBytes: 512 << 20, PIDs: 256, Sandboxes: 4},
		"globex":      {CPUMillis: 1000, MemoryBytes: 512 << 20},
		"hooli":       {CPUMillis: 1000, MemoryBytes: 512 << 20},
	}
	for _, tn := range s.All() {
		if got := tn.Quota; got != want[tn.Path] {
			t.Errorf("quota of %s: got %+v, want %+v", tn.Path, got, want[tn.Path])
		}
	}
	for _, tt := range []struct {
		path Path
		flow netpol.Flow
		rule string // "" denied
	}{
		{"acme", tcp("203.0.113.10", 80), "model-api"},
		{"acme", tcp("203.0.113.10", 443), "model-api"},
		{"acme", tcp("2001:db8:113::10", 443), "model-api"},
		{"acme", tcp("203.0.113.10", 5010), "bulk"},
		{"acme", tcp("203.0.113.10", 5011), ""},
		{"acme", tcp("2001:db8:113::10", 5000), ""},
		{"acme", tcp("198.51.100.7", 443), ""},
		{"acme", tcp("2001:db8:51::7", 443), ""},
		{"acme", tcp("169.254.169.254", 80), ""},
		{"acme/vision", tcp("203.0.113.10", 443), "model-api"},
		{"globex", tcp("203.0.113.10", 80), "api"},
		{"globex", tcp("203.0.113.127", 80), "api"},
		{"globex", tcp("203.0.113.128", 80), ""},
		{"globex", tcp("203.0.113.10", 443), ""},
		{"globex", tcp("2001:db8:113::10", 80), ""},
		{"hooli", tcp("203.0.113.10", 80), ""}, // until api.example.com has resolved to it
	} {
		p, err := s.Compile(tt.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		if v := p.Evaluate(tt.flow); v.Allowed {
			got = p.Rules[v.Rule].Name
		}
		if got != tt.rule {
			t.Errorf("%s to %s port %d: got rule %q, want %q", tt.path, tt.flow.Dst, tt.flow.Port, got, tt.rule)
		}
	}
}

const (
	org = `kind: Tenant
path: acme
members: {uids: [1000, 1001]}
quota: {cpu: 4, memory: 8GiB, pids: 1000}
policy:
  name: org
  rules:
  - {name: api, action: allow, to: [{cidr: 203.0.113.10/32}], ports: [443/tcp]}
  guardrail:
  - {to: [{cidr: 203.0.113.0/24}], ports: [any/tcp]}
`
	team = `kind: Tenant
path: acme/vision
members: {uids: [2000]}
quota: {cpu: 500m}
policy_file: policies/vision.yaml
`
	teamPolicy = `kind: EgressPolicy
name: vision
rules:
- {name: more, action: allow, to: [{cidr: 203.0.113.0/24}], ports: [80/tcp]}
`
	project = "kind: Tenant\npath: acme/vision/train\n"
)

func TestSet(t *testing.T) {
	s := load(t, "z.yaml", org, "b.yaml", team, "policies/vision.yaml", teamPolicy, "a.yaml", project,
		"c.yaml", "kind: Tenant\npath: acme-labs\n", ".hidden.yaml", "not: read", "README", "not read")
	if diff := cmp.Diff([]Path{"acme", "acme/vision", "acme/vision/train", "acme-labs"}, paths(s.All())); diff != "" {
		t.Errorf("all (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]Path{"acme", "acme/vision", "acme/vision/train"}, paths(s.Chain("acme/vision/train"))); diff != "" {
		t.Errorf("chain (-want +got):\n%s", diff)
	}
	if got := s.Chain("acme/nobody"); got != nil {
		t.Errorf("chain of an unknown tenant: got %v, want none", got)
	}
	if _, ok := s.Get("acme/nobody"); ok {
		t.Error("an unknown tenant was found")
	}

	var layers []string
	for _, l := range s.Policies("acme/vision/train") {
		layers = append(layers, l.Tenant+" "+filepath.Base(l.File))
	}
	if diff := cmp.Diff([]string{"acme z.yaml", "acme/vision vision.yaml"}, layers); diff != "" {
		t.Errorf("layers (-want +got):\n%s", diff)
	}

	for _, tt := range []struct {
		uid  uint32
		path Path
		want bool
	}{
		{0, "acme", true}, {0, "nobody", true}, {1000, "acme", true}, {1001, "acme/vision/train", true},
		{2000, "acme/vision", true}, {2000, "acme/vision/train", true}, {2000, "acme", false},
		{1000, "acme-labs", false}, {3000, "acme", false}, {1000, "", false},
	} {
		if got := s.MayAct(tt.uid, tt.path); got != tt.want {
			t.Errorf("uid %d for %s: got %v, want %v", tt.uid, tt.path, got, tt.want)
		}
	}
}

func TestSetIsNotChangedByItsReaders(t *testing.T) {
	s := load(t, "a.yaml", org)
	got, _ := s.Get("acme")
	got.Members[0] = 7
	s.All()[0].Members[0] = 7
	s.Chain("acme")[0].Members[0] = 7
	if s.MayAct(7, "acme") {
		t.Error("a reader made itself a member")
	}
}

func TestCompileWithASandboxPolicy(t *testing.T) {
	s := load(t, "z.yaml", org, "b.yaml", team, "policies/vision.yaml", teamPolicy)
	parse := func(to string) *netpol.Policy {
		p, err := netpol.Parse("policy of box", []byte("kind: EgressPolicy\nname: box\nrules:\n- name: own\n  action: allow\n  to: [{cidr: "+to+"}]\n  ports: [22/tcp]\n"))
		if err != nil {
			t.Fatal(err)
		}
		return &p
	}
	p, err := s.Compile("acme/vision", parse("203.0.113.7/32"))
	if err != nil {
		t.Fatal(err)
	}
	if got := p.Evaluate(tcp("203.0.113.7", 22)); !got.Allowed || p.Rules[got.Rule] != (netpol.RuleRef{ID: 2, Tenant: "acme/vision", Name: "own", Action: netpol.Allow}) {
		t.Errorf("got %+v", got)
	}

	_, err = s.Compile("acme/vision", parse("198.51.100.7/32"))
	file, _ := s.Get("acme")
	want := `compile policy of acme/vision: policy of box:6: rule "own" of acme/vision: 198.51.100.7/32 is outside the guardrail of acme (` + file.File + `:10)`
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	var e *netpol.Error
	if !errors.As(err, &e) {
		t.Errorf("got %T, want it to wrap an *netpol.Error", err)
	}

	if _, err := s.Compile("nobody", nil); !errors.Is(err, ErrUnknown) {
		t.Errorf("got %v, want %v", err, ErrUnknown)
	}
}

// A tenant file may name names; a sandbox's own policy is bound by its
// guardrail, and sets no limits for the tenant.
func TestCompileNamesAndLimits(t *testing.T) {
	s := load(t, "a.yaml", `kind: Tenant
path: acme
policy:
  name: org
  rules:
  - {name: api, action: allow, to: [{fqdn: "*.example.com"}], ports: [443/tcp]}
  guardrail: [{to: [{fqdn: "**.example.com"}], ports: [443/tcp]}]
  rate: {tenant: 1Gbit, sandbox: 500Mbit}
  budget: {egress: 50GiB, per: day, then: block}
`)
	own := func(body string) (netpol.Program, error) {
		p, err := netpol.Parse("policy of box", []byte("kind: EgressPolicy\nname: box\n"+body))
		if err != nil {
			t.Fatal(err)
		}
		return s.Compile("acme", &p)
	}
	p, err := own("rules:\n- {name: own, action: allow, to: [{fqdn: a.b.example.com}], ports: [443/tcp]}\nrate: {sandbox: 10Mbit}\nbudget: {egress: 1GiB, per: hour, then: block, scope: sandbox}\n")
	if err != nil {
		t.Fatal(err)
	}
	if got := p.Evaluate(tcp("203.0.113.7", 443), "a.b.example.com"); !got.Allowed || p.Rules[got.Rule].Name != "own" {
		t.Errorf("got %+v", got)
	}
	if diff := cmp.Diff([]netpol.ProgramRate{
		{Tenant: "acme", Scope: netpol.ScopeTenant, Bits: 1_000_000_000}, {Tenant: "acme", Scope: netpol.ScopeSandbox, Bits: 10_000_000},
	}, p.Rates); diff != "" {
		t.Errorf("rates (-want +got):\n%s", diff)
	}
	if got := len(p.Budgets); got != 2 {
		t.Errorf("got %d budgets, want 2", got)
	}
	file, _ := s.Get("acme")
	for _, tt := range []struct{ body, want string }{
		{"rules: [{name: own, action: allow, to: [{fqdn: a.example.org}], ports: [443/tcp]}]\n",
			`policy of box:3: rule "own" of acme: a.example.org is outside the guardrail of acme (` + file.File + `:7)`},
		{"rules: []\nrate: {tenant: 10Gbit}\n", "policy of box:4: a sandbox's own policy sets no rate for its tenant: write {sandbox: 10Gbit}"},
		{"rules: []\nbudget: {egress: 1TiB, per: day, then: block}\n", `policy of box:4: a sandbox's own policy sets no budget for its tenant: add "scope: sandbox"`},
	} {
		_, err := own(tt.body)
		if want := "compile policy of acme: " + tt.want; err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

func TestTenantsWithoutPolicyMayDoNothing(t *testing.T) {
	s := load(t, "a.yaml", "kind: Tenant\npath: acme\n")
	p, err := s.Compile("acme", nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := p.Evaluate(tcp("203.0.113.10", 443)); got.Allowed {
		t.Errorf("got %+v, want denied", got)
	}
}

func TestLoadEmptyAndMissing(t *testing.T) {
	if got := load(t).All(); len(got) != 0 {
		t.Errorf("got %v, want none", got)
	}
	if _, err := Load(filepath.Join(t.TempDir(), "missing")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want %v", err, os.ErrNotExist)
	}
}

func TestLoadErrors(t *testing.T) {
	for _, tt := range []struct {
		name  string
		files []string
		want  string // DIR stands for the directory
	}{
		{"unknown keys", []string{"a.yaml", "kind: Tenant\npath: acme\nquotas: {}\n", "b.yaml", "kind: Tenant\npath: globex\nquota: {cpus: 1, disk: 1GiB}\nmembers: {uid: [1]}\n"},
			"DIR/a.yaml:3: unknown key \"quotas\" in tenant: did you mean \"quota\"?\n" +
				"DIR/b.yaml:3: unknown key \"cpus\" in quota: did you mean \"cpu\"?\n" +
				"DIR/b.yaml:3: unknown key \"disk\" in quota: known are cpu, memory, pids, sandboxes\n" +
				"DIR/b.yaml:4: unknown key \"uid\" in members: did you mean \"uids\"?\n" +
				"DIR/b.yaml:4: members has no uids: list unix users, as in {uids: [1000]}, or remove it"},
		{"no kind", []string{"a.yaml", "path: acme\n"}, `DIR/a.yaml:1: kind is missing: write "kind: Tenant"`},
		{"wrong kind", []string{"a.yaml", "kind: Tenent\npath: acme\n"}, `DIR/a.yaml:1: unknown kind "Tenent": did you mean "Tenant"?`},
		{"no path", []string{"a.yaml", "kind: Tenant\n"}, "DIR/a.yaml:1: tenant has no path"},
		{"bad path", []string{"a.yaml", "kind: Tenant\npath: Acme\n"}, `DIR/a.yaml:2: tenant path "Acme": part "Acme" has upper-case letters, write "acme"`},
		{"empty file", []string{"a.yaml", ""}, "DIR/a.yaml: is empty"},
		{"yml", []string{"a.yml", "kind: Tenant\npath: acme\n"}, "DIR/a.yml: is not read: name it a.yaml"},
		{"no parent", []string{"a.yaml", "kind: Tenant\npath: acme\n", "b.yaml", "kind: Tenant\npath: acne/vision\n"},
			`DIR/b.yaml:2: tenant acne/vision has no parent: write a file for acne first: did you mean "acme"?`},
		{"duplicate", []string{"a.yaml", "kind: Tenant\npath: acme\n", "b.yaml", "kind: Tenant\n\npath: acme\n"},
			"DIR/b.yaml:3: tenant acme is already defined in DIR/a.yaml:2"},
		{"faults of files come first", []string{"a.yaml", "kind: Tenant\npath: acme\nfoo: 1\n", "b.yaml", "kind: Tenant\npath: acme/vision\n"},
			"DIR/a.yaml:3: unknown key \"foo\" in tenant: known are kind, path, members, quota, policy, policy_file"},

		{"quota above the parent's", []string{"a.yaml", org, "b.yaml", "kind: Tenant\npath: acme/vision\nquota:\n  cpu: 8\n  memory: 8.5GiB\n  pids: 1000\n  sandboxes: 5\n"},
			"DIR/b.yaml:4: acme/vision quota cpu 8 is above acme's 4 (DIR/a.yaml:4)\n" +
				"DIR/b.yaml:5: acme/vision quota memory 8.5GiB is above acme's 8GiB (DIR/a.yaml:4)"},
		{"quota above the grandparent's", []string{"a.yaml", org, "b.yaml", "kind: Tenant\npath: acme/vision\n", "c.yaml", "kind: Tenant\npath: acme/vision/train\nquota: {pids: 1001}\n"},
			"DIR/c.yaml:3: acme/vision/train quota pids 1001 is above acme's 1000 (DIR/a.yaml:4)"},
		{"bad quantities", []string{"a.yaml", "kind: Tenant\npath: acme\nquota:\n  cpu: 0\n  memory: 1GB\n  pids: many\n  sandboxes: -1\n"},
			"DIR/a.yaml:4: quota cpu: zero would be no limit: leave the key out for that\n" +
				"DIR/a.yaml:5: quota memory: size \"1GB\": GB is ambiguous, write 1GiB for steps of 1024\n" +
				"DIR/a.yaml:6: quota pids: \"many\" is not a whole number\n" +
				"DIR/a.yaml:7: quota sandboxes: \"-1\" is not a whole number"},
		{"empty quantity", []string{"a.yaml", "kind: Tenant\npath: acme\nquota:\n  cpu:\n"}, "DIR/a.yaml:4: quota cpu must be a value, not empty"},
		{"bad members", []string{"a.yaml", "kind: Tenant\npath: acme\nmembers:\n  uids:\n  - alice\n  - 4294967295\n  - 7\n  - 7\n"},
			"DIR/a.yaml:5: uid \"alice\" is not a user id: write a number, 0 to 4294967294\n" +
				"DIR/a.yaml:6: uid \"4294967295\" is not a user id: write a number, 0 to 4294967294\n" +
				"DIR/a.yaml:8: uid 7 is listed twice"},
		{"members as a list", []string{"a.yaml", "kind: Tenant\npath: acme\nmembers: [1000]\n"}, "DIR/a.yaml:3: members must be a mapping, not a list"},

		{"inline policy keeps its lines", []string{"a.yaml", "kind: Tenant\npath: acme\npolicy:\n  name: p\n  rules:\n  - name: web\n    action: allow\n    to:\n    - cidr: 10.0.0.1/8\n    ports: [443]\n"},
			"DIR/a.yaml:9: cidr 10.0.0.1/8 has host bits set: write 10.0.0.0/8, or 10.0.0.1/32 for the one address\n" +
				"DIR/a.yaml:10: port \"443\" of rule \"web\": has no protocol, write 443/tcp or 443/udp"},
		{"inline policy has no kind", []string{"a.yaml", "kind: Tenant\npath: acme\npolicy: {kind: EgressPolicy, name: p, rules: []}\n"},
			`DIR/a.yaml:3: unknown key "kind" in policy: known are name, rules, guardrail, mode, rate, budget`},
		{"policy null", []string{"a.yaml", "kind: Tenant\npath: acme\npolicy:\n"}, "DIR/a.yaml:3: policy must be a mapping, not empty"},
		{"policy and policy_file", []string{"a.yaml", "kind: Tenant\npath: acme\npolicy: {name: p, rules: []}\npolicy_file: p/x.yaml\n"},
			"DIR/a.yaml:4: tenant has both policy and policy_file: keep one"},
		{"policy_file outside", []string{"a.yaml", "kind: Tenant\npath: acme\npolicy_file: ../x.yaml\n"},
			`DIR/a.yaml:3: policy_file "../x.yaml" leads out of DIR: give a path below it`},
		{"policy_file absolute", []string{"a.yaml", "kind: Tenant\npath: acme\npolicy_file: /etc/passwd\n"},
			`DIR/a.yaml:3: policy_file "/etc/passwd" leads out of DIR: give a path below it`},
		{"policy_file missing", []string{"a.yaml", "kind: Tenant\npath: acme\npolicy_file: x.yaml\n"},
			`DIR/a.yaml:3: policy_file "x.yaml": no such file or directory`},
		{"policy_file is a directory", []string{"a.yaml", "kind: Tenant\npath: acme\npolicy_file: p\n", "p/x", ""},
			`DIR/a.yaml:3: policy_file "p": is not a regular file`},
		{"policy_file has errors, said once", []string{"a.yaml", "kind: Tenant\npath: acme\npolicy_file: p.yaml\n", "b.yaml", "kind: Tenant\npath: globex\npolicy_file: p.yaml\n", "p.yaml", "kind: EgressPolicy\nname: p\n"},
			"DIR/p.yaml:1: policy has no rules: write \"rules: []\" to allow nothing\n" +
				"DIR/a.yaml:3: policy_file \"p.yaml\" has errors\n" +
				"DIR/b.yaml:3: policy_file \"p.yaml\" has errors"},
		{"policy_file is a tenant", []string{"a.yaml", "kind: Tenant\npath: acme\n", "b.yaml", "kind: Tenant\npath: globex\npolicy_file: a.yaml\n"},
			"DIR/a.yaml:1: unknown kind \"Tenant\": known are EgressPolicy\n" +
				"DIR/b.yaml:3: policy_file \"a.yaml\" has errors"},
		{"policy that nobody uses", []string{"p.yaml", "kind: EgressPolicy\nname: p\nrules: []\n"},
			"DIR/p.yaml:1: is used by no tenant: name it in the policy_file of one, or remove it"},
		{"outside a guardrail", []string{"a.yaml", org, "b.yaml", team, "policies/vision.yaml", strings.ReplaceAll(teamPolicy, "203.0.113.0/24", "198.51.100.0/24"), "c.yaml", project},
			`DIR/policies/vision.yaml:4: rule "more" of acme/vision: 198.51.100.0/24 is outside the guardrail of acme (DIR/a.yaml:10)`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := dirOf(t, tt.files...)
			s, err := Load(dir)
			if err == nil {
				t.Fatalf("got no error, want %s", tt.want)
			}
			if s != nil {
				t.Error("got a set with an error")
			}
			if diff := cmp.Diff(tt.want, strings.ReplaceAll(err.Error(), dir, "DIR")); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
		})
	}
}

func TestLoadReadsNothingOutsideItsDirectory(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "p.yaml")
	if err := os.WriteFile(outside, []byte(teamPolicy), 0o644); err != nil {
		t.Fatal(err)
	}
	dir := dirOf(t, "a.yaml", "kind: Tenant\npath: acme\npolicy_file: link\n")
	if err := os.Symlink(outside, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), "escapes") {
		t.Errorf("got %v, want an error about a path that escapes", err)
	}
}

func TestNewSet(t *testing.T) {
	s, err := NewSet(Tenant{Path: "b"}, Tenant{Path: "a/x", Quota: Quota{PIDs: 5}}, Tenant{Path: "a", Members: []uint32{9}})
	if err != nil {
		t.Fatal(err)
	}
	got := s.All()
	want := []Tenant{{Path: "a", Members: []uint32{9}}, {Path: "a/x", Quota: Quota{PIDs: 5}}, {Path: "b"}}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Tenant{}), cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("tenants (-want +got):\n%s", diff)
	}
	_, err = NewSet(Tenant{Path: "a", Quota: Quota{CPUMillis: 1000}}, Tenant{Path: "a"}, Tenant{Path: "a/x", Quota: Quota{CPUMillis: 1500}}, Tenant{Path: "B"})
	wantErr := `tenant path "B": part "B" has upper-case letters, write "b"
tenant a is already defined in tenant a
a/x quota cpu 1.5 is above a's 1 (tenant a)`
	if err == nil || err.Error() != wantErr {
		t.Errorf("got %v, want %s", err, wantErr)
	}
}
