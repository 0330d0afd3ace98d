// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/bulkheadhq/bulkhead/bpf"
	"github.com/bulkheadhq/bulkhead/netpol"
)

// auditBatch is how many flows one system call reads.
const auditBatch = 4096

// AuditedFlow is what a policy that only watches let pass to one destination.
type AuditedFlow struct {
	Tenant, Rule   string // the deny rule; "" if no rule allows it
	Dst            netip.Addr
	Port           uint16 // EchoPort of an echo request
	Proto          netpol.Proto
	Packets, Bytes uint64
}

// Audited reads what the sandbox's policies let pass for audit alone, sorted by
// destination, protocol, port and rule. It is for people, not for bills: the
// flows of all sandboxes share 65536 places, and the least used ones go.
func (e *Enforcer) Audited(id string, slot uint32) ([]AuditedFlow, error) {
	if err := e.use(); err != nil {
		return nil, err
	}
	defer e.life.RUnlock()
	s, err := e.lockSlot(id, slot)
	if err != nil {
		return nil, fmt.Errorf("read audited flows of %s: %w", id, err)
	}
	defer s.mu.Unlock()
	var out []AuditedFlow
	err = eachEntry(e.maps["audited"], auditBatch, func(k bpf.DatapathBhAuditKey, c bpf.DatapathBhCount) {
		if k.Slot != slot || k.Epoch != e.shm.values[slot].Epoch {
			return
		}
		f := AuditedFlow{Dst: addrOf(k.Addr), Port: k.Port, Proto: netpol.Proto(k.Proto), Packets: c.Packets, Bytes: c.Bytes}
		if k.Rule != cbNoRule {
			if f.Tenant, f.Rule = s.ruleOf(k.Rule); f.Rule == "" {
				return // its name is forgotten
			}
		}
		out = append(out, f)
	})
	if err != nil {
		return nil, fmt.Errorf("read audited flows of %s: %w", id, err)
	}
	slices.SortFunc(out, func(a, b AuditedFlow) int {
		return cmp.Or(a.Dst.Compare(b.Dst), cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Port, b.Port),
			cmp.Compare(a.Tenant, b.Tenant), cmp.Compare(a.Rule, b.Rule))
	})
	return out, nil
}

// eachEntry calls do with every entry of a hash, reading most at once.
func eachEntry[K, V any](m *ebpf.Map, most int, do func(K, V)) error {
	keys, values := make([]K, most), make([]V, most)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		last := errors.Is(err, ebpf.ErrKeyNotExist)
		if err != nil && !last {
			return err
		}
		for i := range n {
			do(keys[i], values[i])
		}
		if last {
			return nil
		}
	}
}
