// SPDX-License-Identifier: Apache-2.0

package supervisor_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/agent/supervisor"
	"github.com/bulkheadhq/bulkhead/tenant"
)

// BenchmarkReload changes the policy of 100 running sandboxes of one tenant,
// with the real store and spool on a disk and a kernel that takes 1 ms for each
// policy.
func BenchmarkReload(b *testing.B) {
	inRealWorld(b, func(b *testing.B, w *world) {
		w.tenants = unlimited(b, "acme-v1")
		w.edit = func(c *supervisor.Config) { c.Interval, c.VerifyEvery = time.Hour, time.Hour }
		w.start(nil)
		var recs []sandbox.Record
		for i := range 100 {
			recs = append(recs, w.create(spec(fmt.Sprintf("s%d", i), "sleep 1000")))
		}
		for _, rec := range recs {
			if _, err := w.sup.Launched(b.Context(), rec.ID); err != nil {
				b.Fatal(err)
			}
		}
		w.m.SetFault(func(op, _ string) error {
			if op == "egress.SetPolicy" {
				time.Sleep(time.Millisecond)
			}
			return nil
		})
		sets := []*tenant.Set{unlimited(b, "acme-v2"), unlimited(b, "acme-v1")}
		i := 0
		for b.Loop() {
			if n, err := w.sup.Reload(b.Context(), sets[i%2]); err != nil || n != 100 {
				b.Fatalf("%d updated, %v", n, err)
			}
			i++
		}
		w.m.SetFault(nil)
	})
}

// unlimited is a directory of testdata without quotas.
func unlimited(b *testing.B, name string) *tenant.Set {
	b.Helper()
	all := tenants(b, name).All()
	for i := range all {
		all[i].Quota = tenant.Quota{}
	}
	set, err := tenant.NewSet(all...)
	if err != nil {
		b.Fatal(err)
	}
	return set
}
