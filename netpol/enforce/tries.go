// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/cilium/ebpf"

	"github.com/bulkheadhq/bulkhead/bpf"
)

// spareBatch is how many empty tries are made at once. To put a trie into
// policies the kernel waits until no program can see the one before, some
// milliseconds, however many there are in one call (on 6.6 and 6.7: each).
// Tries are therefore put there in advance, and starting a sandbox need not
// wait.
const spareBatch = 64

// insertBatch bounds the memory that one batch of entries takes.
const insertBatch = 512

// triePool gives out indices of policies.
//
// An index is free (no slot points at it, nothing is behind it), spare (an
// empty trie is behind it) or taken. A program that read a slot before its
// policy changed may still look at the old index; discard waits for those.
type triePool struct {
	spec           *ebpf.MapSpec
	policies, info *ebpf.Map

	mu     sync.Mutex
	free   []uint32 // +checklocks:mu
	spares []trie   // +checklocks:mu
}

// trie is a policy being made. Its map belongs to whoever holds it.
type trie struct {
	index uint32
	m     *ebpf.Map
}

// init makes all indices free but those in use.
func (p *triePool) init(limit uint32, inUse map[uint32]bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := limit; i > 0; i-- {
		if !inUse[i] {
			p.free = append(p.free, i)
		}
	}
}

func (p *triePool) prefill() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.refill()
}

// refill turns up to spareBatch free indices into spares. What an earlier
// process left behind them goes.
//
// +checklocks:p.mu
func (p *triePool) refill() (err error) {
	n := min(spareBatch, len(p.free))
	if n == 0 {
		return errors.New("all policies are in use")
	}
	indices := slices.Clone(p.free[len(p.free)-n:])
	made := make([]trie, 0, n)
	fds := make([]uint32, 0, n)
	defer func() {
		if err != nil {
			for _, t := range made {
				t.m.Close()
			}
		}
	}()
	for _, index := range indices {
		m, err := ebpf.NewMap(p.spec)
		if err != nil {
			return fmt.Errorf("create policy: %w", err)
		}
		made = append(made, trie{index, m})
		fds = append(fds, uint32(m.FD()))
	}
	if _, err := p.policies.BatchUpdate(indices, fds, nil); err != nil {
		return fmt.Errorf("add %d empty policies: %w", n, err)
	}
	p.free = p.free[:len(p.free)-n]
	p.spares = append(p.spares, made...)
	return nil
}

// take answers an empty trie.
func (p *triePool) take() (trie, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.spares) == 0 {
		if err := p.refill(); err != nil {
			return trie{}, err
		}
	}
	t := p.spares[len(p.spares)-1]
	p.spares = p.spares[:len(p.spares)-1]
	return t, nil
}

// discard frees an index that no slot points at any more. When it returns no
// program sees what was behind it.
func (p *triePool) discard(index uint32) error {
	if err := p.policies.Delete(index); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("delete policy %d: %w", index, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free = append(p.free, index)
	return nil
}

// fill writes entries and their description. On error the trie is not to be
// used.
func (p *triePool) fill(t trie, keys []bpf.DatapathBhLpmKey, values []bpf.DatapathBhPolicyEntry, info bpf.DatapathBhPolicyInfo) error {
	for len(keys) > 0 {
		n := min(insertBatch, len(keys))
		if _, err := t.m.BatchUpdate(keys[:n], values[:n], nil); err != nil {
			return fmt.Errorf("write %d entries: %w", info.Entries, err)
		}
		keys, values = keys[n:], values[n:]
	}
	return p.setInfo(t.index, info)
}

func (p *triePool) setInfo(index uint32, info bpf.DatapathBhPolicyInfo) error {
	if err := p.info.Put(index, info); err != nil {
		return fmt.Errorf("write info of policy %d: %w", index, err)
	}
	return nil
}

func (p *triePool) infoOf(index uint32) (bpf.DatapathBhPolicyInfo, error) {
	var info bpf.DatapathBhPolicyInfo
	if err := p.info.Lookup(index, &info); err != nil {
		return info, fmt.Errorf("read info of policy %d: %w", index, err)
	}
	return info, nil
}

func (p *triePool) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for _, t := range p.spares {
		errs = append(errs, t.m.Close())
	}
	p.spares = nil
	return errors.Join(errs...)
}
