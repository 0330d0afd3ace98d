// SPDX-License-Identifier: Apache-2.0

package api

import (
	"strings"
	"testing"

	"github.com/bulkheadhq/bulkhead/netpol"
)

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
