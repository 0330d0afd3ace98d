// SPDX-License-Identifier: Apache-2.0

// Package gatewaytest makes usage records as a node would, and adds them up in
// plain Go, so that tests can compare a ledger with what was sent.
package gatewaytest

import (
	"fmt"
	"math/big"
	"math/rand/v2"
	"strings"

	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

// Tenants that Batch chooses from. acmeX and acme-eu are not below acme.
var Tenants = []string{"acme", "acme/vision", "acme/vision/train", "acmeX", "acme-eu", "zeta"}

// meters that Batch chooses from. Written out: fixtures depend on them.
var meters = []string{"cpu_ns", "mem_mib_ms", "egress_bytes", "ingress_bytes", "wall_ms"}

// Node numbers and chains records. Sent holds all of them, the record with
// node_seq n at n-1. It is not safe for concurrent use.
type Node struct {
	ID   string
	Sent []*usagev1.Record

	rng  *rand.Rand
	cum  map[string]uint64 // by sandbox/meter
	next map[string]uint64
}

// NewNode makes a node whose records depend on id and seed only.
func NewNode(id string, seed uint64) *Node {
	return &Node{
		ID:   id,
		rng:  rand.New(rand.NewPCG(seed, uint64(len(id)))),
		cum:  map[string]uint64{},
		next: map[string]uint64{},
	}
}

// Add completes r, chains it and adds it to Sent. Fields that r does not have
// get a plausible value.
func (n *Node) Add(r *usagev1.Record) *usagev1.Record {
	if r.Source == "" {
		r.Source = usagev1.Source(n.ID, "boot-1")
	}
	if r.Tenant == "" {
		r.Tenant = "acme"
	}
	if r.Sandbox == "" {
		r.Sandbox = "aaaaaaaaaaaa"
	}
	if r.Meter == "" {
		r.Meter = usagev1.MeterCPU
	}
	if r.Quality == usagev1.Quality_QUALITY_UNSPECIFIED {
		r.Quality = usagev1.Quality_QUALITY_MEASURED
	}
	key := r.Sandbox + "/" + r.Meter
	if r.Id == "" {
		n.next[key]++
		r.Id = usagev1.ID{Sandbox: r.Sandbox, Meter: r.Meter, Generation: 1, Seq: n.next[key]}.String()
	}
	n.cum[key] += r.Delta
	r.Cumulative = max(n.cum[key], r.Delta)
	if r.EndNs == 0 {
		r.StartNs = int64(len(n.Sent)) * 1e9
		r.EndNs = r.StartNs + 1e9
		r.MonoNs = 1e9
	}
	r.NodeSeq = uint64(len(n.Sent)) + 1
	r.PrevHash = n.Head()
	r.Hash = usagev1.Hash(r.PrevHash, r)
	n.Sent = append(n.Sent, r)
	return r
}

// Head is the hash of the last record.
func (n *Node) Head() []byte {
	if len(n.Sent) == 0 {
		return usagev1.ZeroHash()
	}
	return n.Sent[len(n.Sent)-1].Hash
}

// Batch adds count random records and answers them.
func (n *Node) Batch(count int) []*usagev1.Record {
	for range count {
		sandbox := fmt.Sprintf("%s%04d", strings.Repeat("b", 8), n.rng.IntN(20))
		r := &usagev1.Record{
			Tenant:      Tenants[n.rng.IntN(len(Tenants))],
			Sandbox:     strings.NewReplacer("0", "a", "1", "c", "8", "x", "9", "y").Replace(sandbox),
			SandboxName: "job",
			Meter:       meters[n.rng.IntN(len(meters))],
			PolicyRev:   n.rng.Uint64N(5),
			Delta:       n.rng.Uint64N(1 << 40),
		}
		switch n.rng.IntN(40) {
		case 0:
			r.Quality, r.Delta = usagev1.Quality_QUALITY_GAP, 0
		case 1:
			r.Resource = &usagev1.Resource{GpuUuid: "GPU-1", FractionNum: 1, FractionDen: 7}
		case 2:
			r.Delta = ^uint64(0) - n.rng.Uint64N(100)
		}
		n.Add(r)
	}
	return n.Sent[len(n.Sent)-count:]
}

// Key is what a ledger sums by.
type Key struct{ Tenant, Sandbox, Meter string }

// Sum adds up records exactly, by tenant and meter or also by sandbox, leaving
// out what another record of the same node corrects. It looks at every record
// and knows no SQL.
func Sum(bySandbox bool, keep func(*usagev1.Record) bool, nodes ...[]*usagev1.Record) map[Key]*big.Int {
	out := map[Key]*big.Int{}
	for _, records := range nodes {
		replaced := map[string]bool{}
		for _, r := range records {
			replaced[r.Corrects] = true
		}
		for _, r := range records {
			if replaced[r.Id] || !keep(r) {
				continue
			}
			k := Key{Tenant: r.Tenant, Meter: r.Meter}
			if bySandbox {
				k.Sandbox = r.Sandbox
			}
			if out[k] == nil {
				out[k] = new(big.Int)
			}
			out[k].Add(out[k], new(big.Int).SetUint64(r.Delta))
		}
	}
	return out
}

// Below reports whether tenant is root or below it, by splitting the paths.
func Below(root, tenant string) bool {
	want, got := strings.Split(root, "/"), strings.Split(tenant, "/")
	if len(got) < len(want) {
		return false
	}
	for i := range want {
		if got[i] != want[i] {
			return false
		}
	}
	return true
}
