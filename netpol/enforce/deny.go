// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync/atomic"

	"github.com/cilium/ebpf"

	"github.com/bulkheadhq/bulkhead/bpf"
	"github.com/bulkheadhq/bulkhead/netpol"
)

// mapped holds the IPv4-mapped, -compatible and -translated addresses. None
// has business on a wire.
var mapped = netip.MustParsePrefix("::/64")

// filterWords is BH_FILTER_WORDS.
const filterWords = len(bpf.DatapathBhDenyFilter{}.Bits)

// SetHostAddrs replaces the set of the node's own addresses, which no sandbox
// can be allowed to reach. At no time is an address open that is in the old
// set and in the new one.
func (e *Enforcer) SetHostAddrs(addrs []netip.Prefix) error {
	if err := e.use(); err != nil {
		return err
	}
	defer e.life.RUnlock()
	return e.setHardDeny(addrs)
}

// setHardDeny makes the map hard_deny hold exactly what it should.
func (e *Enforcer) setHardDeny(host []netip.Prefix) error {
	e.hostMu.Lock()
	defer e.hostMu.Unlock()
	want, err := hardDenySet(e.cfg.Pools, host, e.cfg.HardDeny)
	if err != nil {
		return fmt.Errorf("set hard denies: %w", err)
	}
	have, err := e.readHardDeny()
	if err != nil {
		return err
	}
	// What programs remember is true of the old set, and of half a change.
	defer atomic.AddUint32(&e.state.values[0].DenyGen, 1)
	// The filter covers the old set and the new one until only the new one is
	// left: it may be too wide, never too narrow.
	filter := filterOf(want)
	for i, word := range filter {
		atomic.OrUint64(&e.filter.values[0].Bits[i], word)
	}
	m := e.maps["hard_deny"]
	for k, why := range want {
		if old, ok := have[k]; ok && old == why {
			continue
		}
		if err := m.Put(k, why); err != nil {
			return fmt.Errorf("deny %s: %w", prefixOf(k), err)
		}
	}
	for k := range have {
		if _, ok := want[k]; ok {
			continue
		}
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("no longer deny %s: %w", prefixOf(k), err)
		}
	}
	for i, word := range filter {
		atomic.StoreUint64(&e.filter.values[0].Bits[i], word)
	}
	e.hostAddrs = slices.Clone(host)
	return nil
}

// filterOf has a bit for the first 16 bits of every address that a prefix of
// set holds.
func filterOf(set map[bpf.DatapathBhLpmKey]reason) (bits [filterWords]uint64) {
	for k := range set {
		first := int(k.Addr[0])<<8 | int(k.Addr[1])
		span := 1
		if n := int(k.Prefixlen) - familyBits; n < 16 {
			span = 1 << (16 - n)
		}
		for i := first; i < first+span; i++ {
			bits[i/64] |= 1 << (i % 64)
		}
	}
	return bits
}

// hardDenySet is what the map should hold. Where an address of the host or a
// network of the operator lies in a special-use network or in a pool, that one
// names the reason: it is the stricter one towards the sandbox.
func hardDenySet(pools, host, operator []netip.Prefix) (map[bpf.DatapathBhLpmKey]reason, error) {
	type deny struct {
		prefix netip.Prefix
		why    reason
	}
	var fixed, all []deny
	for _, h := range netpol.HardDenied() {
		why, ok := reasonOf(h.Reason)
		if !ok {
			return nil, fmt.Errorf("%s: unknown reason %q", h.Prefix, h.Reason)
		}
		if h.Prefix.Addr().Is6() && mapped.Contains(h.Prefix.Addr()) && h.Prefix.Bits() < 128 {
			continue
		}
		fixed = append(fixed, deny{h.Prefix, why})
	}
	fixed = append(fixed, deny{mapped, bpf.DatapathBhReasonBH_MAPPED})
	for _, p := range pools {
		fixed = append(fixed, deny{p, denySandbox})
	}
	for _, p := range operator {
		all = append(all, deny{p, denyNetwork})
	}
	for _, p := range host {
		all = append(all, deny{p, denyHost})
	}
	for i, d := range all {
		best := -1
		for _, f := range fixed {
			if f.prefix.Overlaps(d.prefix) && best < f.prefix.Bits() && f.prefix.Bits() <= d.prefix.Bits() {
				best, all[i].why = f.prefix.Bits(), f.why
			}
		}
	}
	set := map[bpf.DatapathBhLpmKey]reason{}
	for _, d := range slices.Concat(all, fixed) {
		for _, p := range append(netpol.Embedded(d.prefix), d.prefix) {
			k, err := lpmKey(p)
			if err != nil {
				return nil, err
			}
			set[k] = d.why
		}
	}
	return set, nil
}

func (e *Enforcer) readHardDeny() (map[bpf.DatapathBhLpmKey]reason, error) {
	out := map[bpf.DatapathBhLpmKey]reason{}
	var k bpf.DatapathBhLpmKey
	var why reason
	it := e.maps["hard_deny"].Iterate()
	for it.Next(&k, &why) {
		out[k] = why
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read hard denies: %w", err)
	}
	return out, nil
}

// readHostAddrs takes up the host addresses that an earlier process set, so
// that they stay denied until the next SetHostAddrs.
func (e *Enforcer) readHostAddrs() error {
	have, err := e.readHardDeny()
	if err != nil {
		return err
	}
	maps.DeleteFunc(have, func(_ bpf.DatapathBhLpmKey, why reason) bool { return why != denyHost })
	for k := range have {
		if p := prefixOf(k); !netpol.Embeds(p) { // those follow from the IPv4 ones
			e.hostAddrs = append(e.hostAddrs, p)
		}
	}
	return nil
}
