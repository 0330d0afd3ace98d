// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/gateway/gatewaytest"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

// BenchmarkAppend reports rows/s on the disk that holds the temporary
// directory; set TMPDIR to measure another. 10,000 sandboxes need 833 rows/s.
func BenchmarkAppend(b *testing.B) {
	for _, size := range []int{1, 100, 1000} {
		b.Run(fmt.Sprintf("batch=%d", size), func(b *testing.B) {
			l := open(b, b.TempDir())
			n := gatewaytest.NewNode("node", 1)
			var batches [][]*usagev1.Record
			for range b.N {
				batches = append(batches, n.Batch(size))
			}
			b.ResetTimer()
			for _, batch := range batches {
				appendOK(b, l, "node", batch)
			}
			b.ReportMetric(float64(b.N*size)/b.Elapsed().Seconds(), "rows/s")
		})
	}
	for _, size := range []int{1, 50} {
		b.Run(fmt.Sprintf("nodes=20/batch=%d", size), func(b *testing.B) {
			l := open(b, b.TempDir())
			nodes := make([]*gatewaytest.Node, 20)
			for i := range nodes {
				nodes[i] = gatewaytest.NewNode(fmt.Sprintf("node-%d", i), uint64(i))
				nodes[i].Batch(b.N * size)
			}
			b.ResetTimer()
			var wg sync.WaitGroup
			for _, n := range nodes {
				wg.Go(func() {
					for at := 0; at < len(n.Sent); at += size {
						if _, err := l.Append(b.Context(), n.ID, n.Sent[at:at+size]); err != nil {
							b.Error(err)
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N*size*len(nodes))/b.Elapsed().Seconds(), "rows/s")
		})
	}
}

// BenchmarkQuery asks a ledger of 200,000 records: a day of 28 sandboxes.
func BenchmarkQuery(b *testing.B) {
	l := open(b, b.TempDir())
	n := gatewaytest.NewNode("node", 1)
	for range 200 {
		appendOK(b, l, "node", n.Batch(1000))
	}
	hour := Filter{Tenant: "acme", StartNs: 100_000e9, EndNs: 100_000e9 + int64(time.Hour)}
	for _, q := range []struct {
		name string
		f    Filter
	}{
		{"all", Filter{}},
		{"tenant", Filter{Tenant: "acme"}},
		{"tenant-hour", hour},
		{"sandbox", Filter{Sandbox: n.Sent[0].Sandbox}},
	} {
		b.Run("usage/"+q.name, func(b *testing.B) {
			for b.Loop() {
				totals(b, l.Reader, q.f, false)
			}
		})
	}
	b.Run("records/tenant-hour", func(b *testing.B) {
		for b.Loop() {
			records(b, l.Reader, hour)
		}
	})
	b.Run("verify", func(b *testing.B) {
		for b.Loop() {
			if _, err := l.Verify(b.Context(), "node"); err != nil {
				b.Fatal(err)
			}
		}
	})
}
