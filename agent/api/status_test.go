// SPDX-License-Identifier: Apache-2.0

package api

import (
	"strings"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/netpol"
)

func TestWindowEnd(t *testing.T) {
	for _, test := range []struct {
		start string
		per   netpol.Window
		want  string
	}{
		{"2026-11-02T10:00:00Z", netpol.PerHour, "2026-11-02T11:00:00Z"},
		{"2026-12-31T23:00:00Z", netpol.PerHour, "2027-01-01T00:00:00Z"},
		{"2028-02-28T00:00:00Z", netpol.PerDay, "2028-02-29T00:00:00Z"},
		{"2026-02-01T00:00:00Z", netpol.PerMonth, "2026-03-01T00:00:00Z"},
		{"2026-12-01T00:00:00Z", netpol.PerMonth, "2027-01-01T00:00:00Z"},
	} {
		start, err := time.Parse(time.RFC3339, test.start)
		if err != nil {
			t.Fatal(err)
		}
		if got := windowEnd(uint64(start.Unix()), test.per).Format(time.RFC3339); got != test.want {
			t.Errorf("the %s from %s ends at %s, want %s", test.per, test.start, got, test.want)
		}
	}
	if got := windowEnd(0, netpol.PerDay); !got.IsZero() {
		t.Errorf("a window that has not begun ends at %s", got)
	}
}

func TestIsName(t *testing.T) {
	long := strings.Repeat("a", 63)
	for name, want := range map[string]bool{
		"example.com": true, "localhost": true, "_srv._tcp.example.com": true, "1.example.com": true, "xn--bcher-kva.example": true,
		long + ".example": true, strings.Repeat(long+".", 3) + "com": true,
		"": false, ".": false, "a..b": false, "203.0.113": false, "2130706433": false, "0x7f.1": false, "*.example.com": false, "bücher.example": false,
		"a b": false, "example.com:80": false, "::1": false, long + "a.example": false, strings.Repeat(long+".", 4) + "com": false,
	} {
		if got := isName(name); got != want {
			t.Errorf("%q: got %t, want %t", name, got, want)
		}
	}
}

// What somebody wrote as a policy's target can be told from its row.
func TestTarget(t *testing.T) {
	p, err := netpol.Parse("p", []byte(`kind: EgressPolicy
name: p
rules:
- name: r
  action: allow
  to: [{fqdn: api.example.com}, {fqdn: git.corp.example, allow_private: true}, {cidr: 10.0.0.0/8, except: [10.1.0.0/16, 10.2.0.0/16]}]
  ports: [443/tcp]
`))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"api.example.com", "git.corp.example (private too)", "10.0.0.0/8 except 10.1.0.0/16 and 10.2.0.0/16"}
	for i, to := range p.Rules[0].To {
		if got := target(to); got != want[i] {
			t.Errorf("got %q, want %q", got, want[i])
		}
	}
}
