// SPDX-License-Identifier: Apache-2.0

package admit

import (
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/tenant"
)

func set(t *testing.T) *tenant.Set {
	t.Helper()
	s, err := tenant.NewSet(
		tenant.Tenant{Path: "acme", File: "acme.yaml", Quota: tenant.Quota{CPUMillis: 2000, MemoryBytes: 1 << 30, PIDs: 500, Sandboxes: 4}},
		tenant.Tenant{Path: "acme/vision", File: "vision.yaml", Quota: tenant.Quota{MemoryBytes: 512 << 20}},
		tenant.Tenant{Path: "globex", File: "globex.yaml"},
	)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func claim(path tenant.Path, cpu, memory, pids int64) Claim {
	return Claim{Tenant: path, Limits: sandbox.Limits{CPUMillis: cpu, MemoryBytes: memory, PIDs: pids}}
}

func TestDecide(t *testing.T) {
	held := []Claim{claim("acme/vision", 1000, 256<<20, 100), claim("acme", 500, 400<<20, 100)}
	node := Node{Capacity: tenant.Quota{CPUMillis: 4000, MemoryBytes: 8 << 30}}
	for _, c := range []struct {
		name  string
		node  Node
		held  []Claim
		want  Claim
		deny  Reason
		res   string
		setBy string
		text  string
	}{
		{"fits", node, held, claim("acme/vision", 500, 128<<20, 10), "", "", "", ""},
		{"fits exactly", node, held, claim("acme", 500, 368<<20, 300), "", "", "", ""},
		{"team's memory", node, held, claim("acme/vision", 100, 300<<20, 10), Quota, Memory, "acme/vision", "300MiB wanted, 256MiB of 512MiB in use (limit set by acme/vision in vision.yaml)"},
		{"organisation's cpu, asked of the team", node, held, claim("acme/vision", 600, 1<<20, 10), Quota, CPU, "acme", "0.6 wanted, 1.5 of 2 in use"},
		{"organisation's pids", node, held, claim("acme", 100, 1<<20, 301), Quota, PIDs, "acme", "301 wanted, 200 of 500"},
		{"count", node, []Claim{claim("acme", 1, 1, 1), claim("acme", 1, 1, 1), claim("acme/vision", 1, 1, 1), claim("acme", 1, 1, 1)}, claim("acme", 1, 1, 1), Quota, Sandboxes, "acme", "1 wanted, 4 of 4"},
		{"no quota, but the node", node, held, claim("globex", 3000, 1<<20, 10), NodeCapacity, CPU, "node", "limit set by node"},
		{"unknown", node, held, claim("initech", 1, 1, 1), TenantUnknown, "", "", "initech is not known"},
		{"unknown below a known one", node, held, claim("acme/nobody", 1, 1, 1), TenantUnknown, "", "", "acme is, see"},
		{"spool", Node{SpoolFull: "full"}, held, claim("globex", 1, 1, 1), UsageSpool, "", "", "full"},
	} {
		d := Decide(set(t), c.node, c.held, c.want)
		switch {
		case c.deny == "" && d != nil:
			t.Errorf("%s: refused: %v", c.name, d)
		case c.deny == "":
		case d == nil:
			t.Errorf("%s: allowed, want %s", c.name, c.deny)
		case d.Reason != c.deny || d.Resource != c.res || d.SetBy != c.setBy || !strings.Contains(d.Error(), c.text):
			t.Errorf("%s: got %s %s by %q: %v; want %s %s by %q with %q", c.name, d.Reason, d.Resource, d.SetBy, d, c.deny, c.res, c.setBy, c.text)
		}
	}
}

func TestPublish(t *testing.T) {
	port := func(host uint16, proto netpol.Proto) sandbox.Port {
		return sandbox.Port{Host: host, Sandbox: 80, Proto: proto}
	}
	held := []Claim{
		{Tenant: "acme/vision", Name: "web", Publish: []sandbox.Port{port(30001, netpol.TCP), port(30002, netpol.TCP)}},
		{Tenant: "globex", Name: "api", Publish: []sandbox.Port{port(30003, netpol.TCP)}},
	}
	some := Ports{Lo: 30000, Hi: 30009}
	for _, c := range []struct {
		name   string
		may    Ports
		tenant tenant.Path
		want   []sandbox.Port
		port   int64 // refused; 0: none is
		text   string
	}{
		{"free", some, "acme", []sandbox.Port{port(30000, netpol.TCP), port(30009, netpol.TCP)}, 0, ""},
		{"none wanted where none is to be had", Ports{}, "acme", nil, 0, ""},
		{"off", Ports{}, "acme", []sandbox.Port{port(30000, netpol.TCP)}, 30000, "network.publish_ports"},
		{"below", some, "acme", []sandbox.Port{port(29999, netpol.TCP)}, 29999, "30000-30009"},
		{"above", some, "acme", []sandbox.Port{port(30000, netpol.TCP), port(30010, netpol.TCP)}, 30010, "30000-30009"},
		{"taken below", some, "acme", []sandbox.Port{port(30002, netpol.TCP)}, 30002, "sandbox web of acme/vision has it"},
		{"taken by itself", some, "globex", []sandbox.Port{port(30003, netpol.TCP)}, 30003, "sandbox api of globex has it"},
		{"taken above", some, "acme/vision", []sandbox.Port{port(30003, netpol.TCP)}, 30003, "a sandbox of another tenant has it"},
		{"the node's own", some, "acme", []sandbox.Port{port(30005, netpol.TCP)}, 30005, "a service of the node listens there"},
		{"the other protocol's", some, "acme", []sandbox.Port{port(30003, netpol.UDP)}, 0, ""},
	} {
		listens := func(p sandbox.Port) bool { return p.Host == 30005 }
		d := Decide(set(t), Node{PublishPorts: c.may, Listens: listens}, held, Claim{Tenant: c.tenant, Publish: c.want})
		switch {
		case c.port == 0 && d != nil:
			t.Errorf("%s: refused: %v", c.name, d)
		case c.port == 0:
		case d == nil:
			t.Errorf("%s: allowed", c.name)
		case d.Reason != PublishPort || d.Resource != HostPort || d.Want != c.port || !strings.Contains(d.Error(), c.text):
			t.Errorf("%s: got %+v: %v; want port %d with %q", c.name, *d, d, c.port, c.text)
		}
	}
}

// TestNeverOver: whatever is asked for in whatever order, no quota is exceeded,
// and what is refused would have exceeded the one that is named.
func TestNeverOver(t *testing.T) {
	s := set(t)
	paths := []tenant.Path{"acme", "acme/vision", "globex"}
	node := Node{Capacity: tenant.Quota{CPUMillis: 5000, MemoryBytes: 2 << 30, Sandboxes: 9}}
	for seed := range uint64(200) {
		rnd := rand.New(rand.NewPCG(seed, 7))
		var held []Claim
		for range 60 {
			if len(held) > 0 && rnd.IntN(3) == 0 {
				i := rnd.IntN(len(held))
				held = append(held[:i], held[i+1:]...)
				continue
			}
			want := claim(paths[rnd.IntN(len(paths))], rnd.Int64N(1500), rnd.Int64N(400<<20), rnd.Int64N(200))
			d := Decide(s, node, held, want)
			if d == nil {
				held = append(held, want)
			} else if d.InUse+d.Want <= d.Limit {
				t.Fatalf("seed %d: refused although it fits: %v", seed, d)
			}
			for _, ten := range s.All() {
				q, u := ten.Quota, Sum(ten.Path, held)
				if q.Sandboxes > 0 && u.Sandboxes > q.Sandboxes || q.CPUMillis > 0 && u.CPUMillis > q.CPUMillis || q.MemoryBytes > 0 && u.MemoryBytes > q.MemoryBytes || q.PIDs > 0 && u.PIDs > q.PIDs {
					t.Fatalf("seed %d: %s holds %+v of %+v", seed, ten.Path, u, q)
				}
			}
			if u := Sum("", held); u.CPUMillis > 5000 || u.MemoryBytes > 2<<30 || u.Sandboxes > 9 {
				t.Fatalf("seed %d: the node holds %+v", seed, u)
			}
		}
	}
}
