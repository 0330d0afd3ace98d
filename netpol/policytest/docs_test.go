// SPDX-License-Identifier: Apache-2.0

package policytest

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/bulkheadhq/bulkhead/netpol"
)

func read(t *testing.T, file string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// check runs cases against a chain.
func check(t *testing.T, layers []netpol.Layer, file, cases string) {
	t.Helper()
	prog, err := netpol.Compile(layers)
	if err != nil {
		t.Fatal(err)
	}
	list, err := Load(file, []byte(cases))
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range Run(prog, list) {
		if !r.OK {
			t.Error(r)
		}
	}
}

func TestExamples(t *testing.T) {
	const dir = "../../deploy/examples/policies/"
	p, err := netpol.Parse("agents.yaml", []byte(read(t, dir+"agents.yaml")))
	if err != nil {
		t.Fatal(err)
	}
	check(t, []netpol.Layer{{Tenant: "acme", Policy: p}}, "agents-cases.yaml", read(t, dir+"agents-cases.yaml"))
}

// TestDocs reads every YAML block of docs/policy.md. The words after yaml say
// whose policy it is: a path of one part begins a chain, a longer one goes on
// below. Cases run against the chain so far. A refused policy is followed by
// its error.
func TestDocs(t *testing.T) {
	block := regexp.MustCompile("(?ms)^```(yaml|text)([^\n]*)\n(.*?)^```$")
	var chain []netpol.Layer
	var refusal string
	policies, cases := 0, 0
	for _, m := range block.FindAllStringSubmatch(read(t, "../../docs/policy.md"), -1) {
		kind, info, body := m[1], strings.Fields(m[2]), m[3]
		switch {
		case kind == "text":
			if diff := cmp.Diff(strings.TrimSpace(body), refusal); diff != "" {
				t.Errorf("error (-docs +got):\n%s", diff)
			}
			refusal = ""
		case len(info) == 0:
			cases++
			check(t, chain, "policy.md", body)
		default:
			policies++
			p, err := netpol.Parse("policy.md", []byte(body))
			if err != nil {
				t.Fatalf("%v\n%s", err, body)
			}
			l := netpol.Layer{Tenant: info[0], Policy: p}
			if !strings.Contains(info[0], "/") {
				chain = nil
			}
			if len(info) > 1 {
				if _, err := netpol.Compile(append(chain[:1:1], l)); err != nil {
					refusal = err.Error()
				}
				continue
			}
			chain = append(chain, l)
		}
	}
	if policies < 6 || cases < 4 || refusal != "" {
		t.Errorf("got %d policies, %d blocks of cases and the refusal %q without its text", policies, cases, refusal)
	}
}
