// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"errors"
	"fmt"
	"math"
	"sync"

	"github.com/cilium/ebpf"

	"github.com/bulkheadhq/bulkhead/bpf"
)

// generationBlock is how many generations one write to meta reserves.
const generationBlock = 1024

// generations gives out policy generations, each once while pins exist: what
// programs remember is kept under the generation, and must never be taken for
// what another policy says.
type generations struct {
	meta *ebpf.Map

	mu    sync.Mutex
	next  uint32 // +checklocks:mu
	limit uint32 // +checklocks:mu; written to meta: the first that is not reserved
}

// resume goes on where an earlier process may have come to.
func (g *generations) resume(next uint32) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.next, g.limit = max(next, 1), max(next, 1)
}

// take answers a generation that was never used. It is never 0.
func (g *generations) take() (uint32, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.next == g.limit {
		if g.limit > math.MaxUint32-generationBlock {
			return 0, errors.New("all generations of policies are used up: drain the node and purge")
		}
		var meta bpf.DatapathBhMeta
		if err := g.meta.Lookup(uint32(0), &meta); err != nil {
			return 0, fmt.Errorf("read meta: %w", err)
		}
		meta.NextGen = g.limit + generationBlock
		if err := g.meta.Put(uint32(0), meta); err != nil {
			return 0, fmt.Errorf("reserve generations: write meta: %w", err)
		}
		g.limit = meta.NextGen
	}
	g.next++
	return g.next - 1, nil
}

// reserved is what meta must hold.
func (g *generations) reserved() uint32 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.limit
}
