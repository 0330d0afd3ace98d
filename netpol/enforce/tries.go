// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cilium/ebpf"

	"github.com/bulkheadhq/bulkhead/bpf"
)

// To put a map into policies or learned the kernel waits until no program can
// see the one before, some milliseconds, however many there are in one call
// (on 6.6, 6.7 and before 6.6: each). That is done in the background: spares
// are kept ready, and indices that are no longer used become spares again.
const (
	spareTarget = 192 // spares that are kept ready, if there are so many indices
	spareBatch  = 128 // of them made at once in the background, if that is quick
	urgentBatch = 8   // and while somebody waits, or if it is slow
	emptyBatch  = 256 // indices emptied at once
)

// slowRefill is when the background had better make fewer at once: whoever needs
// one meanwhile waits for all of them.
const slowRefill = 200 * time.Millisecond

// retireDelay lets programs that have read an index just before it was retired
// look up what is behind it before that goes. They would drop their packet.
const retireDelay = 2 * time.Millisecond

// insertBatch bounds the memory that one batch of entries takes.
const insertBatch = 512

// policyPool gives out indices of policies, learned and heads.
//
// An index is free (no slot points at it, nobody cares what is behind it),
// spare (an empty trie and an empty hash are behind it), taken, or retired: no
// slot points at it any more, but a program that read the slot before may
// still look. One goroutine turns retired and free indices into spares.
//
// Lock order: making, then mu.
type policyPool struct {
	trieSpec, learnedSpec   *ebpf.MapSpec
	policies, learned, info *ebpf.Map
	reaped                  func(retired) // called without locks, when no program can see it any more

	wake       chan struct{} // depth 1: one wish is as good as many; never closed
	quit, done chan struct{} // quit is closed by close, done by the goroutine

	making sync.Mutex
	blank  spare // +checklocks:making; what is behind many free indices

	mu      sync.Mutex
	free    []uint32  // +checklocks:mu
	spares  []spare   // +checklocks:mu
	retired []retired // +checklocks:mu
}

// spare is a policy to be made. Its maps belong to whoever holds it.
type spare struct {
	index         uint32
	trie, learned *ebpf.Map
}

func (s spare) close() error {
	var errs []error
	for _, m := range []*ebpf.Map{s.trie, s.learned} {
		if m != nil {
			errs = append(errs, m.Close())
		}
	}
	return errors.Join(errs...)
}

// retired is what may be used again once no program can see it.
type retired struct {
	index    uint32
	counters []uint32 // of rules
	limits   limitIDs // of the policy
}

// init makes all indices free but those in use, and begins to make spares.
func (p *policyPool) init(limit uint32, inUse map[uint32]bool) error {
	p.mu.Lock()
	for i := limit; i > 0; i-- {
		if !inUse[i] {
			p.free = append(p.free, i)
		}
	}
	p.mu.Unlock()
	var err error
	p.making.Lock()
	p.blank, err = p.make(0)
	p.making.Unlock()
	if err == nil {
		err = p.refill(urgentBatch)
	}
	if err != nil {
		return err
	}
	p.wake, p.quit, p.done = make(chan struct{}, 1), make(chan struct{}), make(chan struct{})
	go p.run()
	p.nudge()
	return nil
}

// run refills until close.
func (p *policyPool) run() {
	defer close(p.done)
	batch := urgentBatch
	for {
		select {
		case <-p.quit:
			return
		case <-p.wake:
		}
		for p.wanting() {
			select {
			case <-p.quit:
				return
			case <-time.After(retireDelay):
			}
			// What fails here is tried again, and reported, by whoever needs it.
			start := time.Now()
			if p.refill(batch) != nil {
				break
			}
			batch = min(2*batch, spareBatch)
			if time.Since(start) > slowRefill {
				batch = urgentBatch
			}
		}
	}
}

func (p *policyPool) nudge() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// wanting tells whether there is something to do in the background.
func (p *policyPool) wanting() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.retired) > 0 || len(p.spares) < spareTarget && len(p.free) > 0
}

// make makes the two empty maps of an index.
func (p *policyPool) make(index uint32) (s spare, err error) {
	s.index = index
	if s.trie, err = ebpf.NewMap(p.trieSpec); err != nil {
		return spare{}, fmt.Errorf("create policy: %w", err)
	}
	if s.learned, err = ebpf.NewMap(p.learnedSpec); err != nil {
		s.trie.Close()
		return spare{}, fmt.Errorf("create table of learned addresses: %w", err)
	}
	return s, nil
}

// refill makes up to batch spares out of retired indices first, then free ones,
// and empties the retired ones that are too many for that. What an earlier
// process left behind them goes.
func (p *policyPool) refill(batch int) (err error) {
	p.making.Lock()
	defer p.making.Unlock()
	gone, free, wanted := p.pick(batch)
	n := len(gone) + len(free)
	if n == 0 {
		return p.exhausted()
	}
	made := make([]spare, 0, wanted)
	defer func() {
		if err == nil {
			return
		}
		for _, s := range made {
			_ = s.close()
		}
		p.mu.Lock()
		p.retired, p.free = append(p.retired, gone...), append(p.free, free...)
		p.mu.Unlock()
	}()
	indices := make([]uint32, 0, n)
	for _, r := range gone {
		indices = append(indices, r.index)
	}
	indices = append(indices, free...)
	tries, hashes := make([]uint32, n), make([]uint32, n)
	for i, index := range indices {
		s := p.blank
		if i < wanted {
			if s, err = p.make(index); err != nil {
				return err
			}
			made = append(made, s)
		}
		tries[i], hashes[i] = uint32(s.trie.FD()), uint32(s.learned.FD())
	}
	if _, err := p.policies.BatchUpdate(indices, tries, nil); err != nil {
		return fmt.Errorf("empty %d policies: %w", n, err)
	}
	if _, err := p.learned.BatchUpdate(indices, hashes, nil); err != nil {
		return fmt.Errorf("empty %d tables of learned addresses: %w", n, err)
	}
	for _, r := range gone {
		p.reaped(r)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.spares, p.free = append(p.spares, made...), append(p.free, indices[wanted:]...)
	return nil
}

// pick takes out what refill should work on: indices that are retired, and
// free ones, and how many of all these should become spares, the first ones.
func (p *policyPool) pick(batch int) (gone []retired, free []uint32, wanted int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := min(len(p.retired), emptyBatch)
	gone = append(gone, p.retired[:n]...)
	p.retired = append(p.retired[:0], p.retired[n:]...)
	wanted = min(max(spareTarget-len(p.spares), 0), batch)
	more := min(max(wanted-n, 0), len(p.free))
	free = append(free, p.free[len(p.free)-more:]...)
	p.free = p.free[:len(p.free)-more]
	return gone, free, min(wanted, n+more)
}

// take answers a policy to be made. It waits for the kernel only if many
// policies have changed just before.
func (p *policyPool) take() (spare, error) {
	for {
		p.mu.Lock()
		n := len(p.spares)
		if n > 0 {
			s := p.spares[n-1]
			p.spares = p.spares[:n-1]
			p.mu.Unlock()
			if n < spareTarget/2 {
				p.nudge()
			}
			return s, nil
		}
		p.mu.Unlock()
		if err := p.refill(urgentBatch); err != nil {
			return spare{}, err
		}
	}
}

// exhausted is an error if there is no spare and nothing to make one of.
//
// +checklocks:p.making
func (p *policyPool) exhausted() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.spares)+len(p.free)+len(p.retired) == 0 {
		return errors.New("all policies are in use")
	}
	return nil
}

// putBack gives back a spare that no slot has ever pointed at, but that is not
// empty any more.
func (p *policyPool) putBack(s spare) error {
	p.mu.Lock()
	p.free = append(p.free, s.index)
	p.mu.Unlock()
	p.nudge()
	return s.close()
}

// retire gives up an index that no slot points at any more, and what only it
// has used. It does not wait.
func (p *policyPool) retire(r retired) {
	p.mu.Lock()
	p.retired = append(p.retired, r)
	p.mu.Unlock()
	p.nudge()
}

// fill writes entries and their description. On error the spare is not to be
// used.
func (p *policyPool) fill(s spare, keys []bpf.DatapathBhLpmKey, values []bpf.DatapathBhPolicyEntry, info bpf.DatapathBhPolicyInfo) error {
	for len(keys) > 0 {
		n := min(insertBatch, len(keys))
		if _, err := s.trie.BatchUpdate(keys[:n], values[:n], nil); err != nil {
			return fmt.Errorf("write %d entries: %w", info.Entries, err)
		}
		keys, values = keys[n:], values[n:]
	}
	return p.setInfo(s.index, info)
}

func (p *policyPool) setInfo(index uint32, info bpf.DatapathBhPolicyInfo) error {
	if err := p.info.Put(index, info); err != nil {
		return fmt.Errorf("write info of policy %d: %w", index, err)
	}
	return nil
}

func (p *policyPool) infoOf(index uint32) (bpf.DatapathBhPolicyInfo, error) {
	var info bpf.DatapathBhPolicyInfo
	if err := p.info.Lookup(index, &info); err != nil {
		return info, fmt.Errorf("read info of policy %d: %w", index, err)
	}
	return info, nil
}

// learnedOf opens the table of learned addresses of a policy.
func (p *policyPool) learnedOf(index uint32) (*ebpf.Map, error) {
	var m *ebpf.Map
	if err := p.learned.Lookup(index, &m); err != nil {
		return nil, fmt.Errorf("open learned addresses of policy %d: %w", index, err)
	}
	return m, nil
}

// close stops the goroutine. What is retired is found free by the next
// process.
func (p *policyPool) close() error {
	if p.quit != nil {
		close(p.quit)
		<-p.done
		p.quit = nil
	}
	p.making.Lock()
	defer p.making.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	errs := []error{p.blank.close()}
	p.blank = spare{}
	for _, s := range p.spares {
		errs = append(errs, s.close())
	}
	p.spares = nil
	return errors.Join(errs...)
}
