// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/bulkheadhq/bulkhead/gateway/gatewaytest"
	"github.com/bulkheadhq/bulkhead/gateway/ledger/ledgertest"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

func TestVerify(t *testing.T) {
	cfg := testConfig(t.TempDir())
	start(t, cfg)
	c := dial(t, cfg.Listen[0].Addr)
	for _, id := range []string{"n1", "n2", "n3"} {
		n := gatewaytest.NewNode(id, 1)
		if _, err := c.push(t.Context(), id, n.Batch(4)); err != nil {
			t.Fatal(err)
		}
		if id == "n2" {
			bad := proto.Clone(n.Sent[1]).(*usagev1.Record)
			bad.Tenant = "zeta/x"
			_, err := c.push(t.Context(), id, []*usagev1.Record{bad})
			wantCode(t, err, codes.FailedPrecondition, "")
		}
	}
	ledgertest.Tamper(t, cfg.DataDir, "DROP TRIGGER records_no_update", "UPDATE records SET delta = delta + 1 WHERE seq = 3")
	var got lines
	err := Verify(t.Context(), cfg, "", &got)
	if err == nil || !strings.Contains(err.Error(), "chain of 1 of 3 nodes is broken, first: node n1: record 3: ") {
		t.Errorf("got %v, want n1 broken at 3", err)
	}
	want := []string{"n1: broken at record 3: ", "n2: 4 records, chain whole\n", "n3: 4 records, chain whole\n", "n2: refused (1x), last at "}
	if len(got) != len(want) {
		t.Fatalf("got %q, want %q", got, want)
	}
	for i := range want {
		if !strings.HasPrefix(got[i], want[i]) {
			t.Errorf("line %d: got %q, want %q", i, got[i], want[i])
		}
	}
	got = nil
	if err := Verify(t.Context(), cfg, "n3", &got); err != nil || len(got) != 1 {
		t.Errorf("n3 alone: got %q, %v, want one line", got, err)
	}
}
