// SPDX-License-Identifier: Apache-2.0

package config

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pelletier/go-toml/v2"
)

var prefixes = cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })

// TestSampleIsTheManual: the sample names every key, and says the defaults.
func TestSampleIsTheManual(t *testing.T) {
	got, err := Parse("bulkhead-agent.toml", Sample)
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Egress.HostNetworks = []netip.Prefix{}
	want.DNS.Upstreams = []string{}
	if diff := cmp.Diff(want, got, prefixes); diff != "" {
		t.Errorf("the sample differs from the defaults:\n%s", diff)
	}
	var raw map[string]any
	if err := toml.Unmarshal(Sample, &raw); err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	var walk func(prefix string, m map[string]any)
	walk = func(prefix string, m map[string]any) {
		for k, v := range m {
			have[prefix+k] = true
			if sub, ok := v.(map[string]any); ok {
				walk(prefix+k+".", sub)
			}
		}
	}
	walk("", raw)
	for _, k := range keys() {
		if !have[k] {
			t.Errorf("the sample does not explain %q", k)
		}
	}
}

func TestBadInput(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"\nstate_dri = \"/x\"\n", `f.toml:2: unknown key "state_dri"; did you mean "state_dir"?`},
		{"[network]\nmtu = 1500\npoool4 = \"10.0.0.0/16\"\n", `f.toml:3: unknown key "network.poool4"; did you mean "network.pool4"?`},
		{"[usage]\ninterval = 10\n", "f.toml:2: usage.interval:"},
		{"[usage]\ninterval = \"10 parsecs\"\n", `is not a duration such as "30s"`},
		{"[usage]\ninterval = \"1ms\"\n", "usage.interval in ms = 1 is not between 100 and"},
		{"[sandbox]\ndefault_memory = \"lots\"\n", "f.toml:2:"},
		{"state_dir = \"relative\"\n", `state_dir = "relative" is not an absolute path`},
		{"[network]\npool4 = \"10.0.0.0/31\"\n", "network.pool4"},
		{"[network]\npool6 = \"10.0.0.0/16\"\n", "network.pool6"},
		{"[network]\nlink_prefix = \"toolong\"\n", "network.link_prefix"},
		{"[usage]\ncert_file = \"/x\"\n", "go together"},
		{"[network]\npublish_ports = \"30999-30000\"\n", `f.toml:2: "30999-30000" is not a range of ports`},
		{"[network]\npublish_ports = \"0-10\"\n", `f.toml:2: "0-10" is not a range`},
		{"[network]\nmax_connections = 0\n", "network.max_connections = 0 is not between 1 and"},
		{"[dns]\nupstreams = [\"192.0.2.53\"]\n", `dns.upstreams: "192.0.2.53": write an address and a port`},
		{"[dns]\nupstreams = [\"dns.example.com:53\"]\n", "dns.upstreams"},
		{"[dns]\nupstreams = [\"tls://192.0.2.53:853\"]\n", "dns.upstreams"},
		{"[dns]\nca_file = \"ca.pem\"\n", "dns.ca_file"},
		{"[dns]\nttl_floor = \"30m\"\nttl_cap = \"10m\"\n", "dns.ttl_cap in ms = 600000 is not between 1800000 and"},
		{"[dns]\nttl_floor = 30\n", "f.toml:2: dns.ttl_floor:"},
		{"[log]\nformat = \"xml\"\n", "log.format"},
		{"this is not toml", "f.toml:1:"},
	} {
		_, err := Parse("f.toml", []byte(c.text))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: got %v, want %q in it", c.text, err, c.want)
		}
		if err != nil && strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: the error has more than one line: %v", c.text, err)
		}
	}
}

func TestPortRange(t *testing.T) {
	for text, want := range map[string]PortRange{
		"30000-30999": {30000, 30999}, "8080": {8080, 8080}, "": {}, "1-65535": {1, 65535},
	} {
		c, err := Parse("f.toml", []byte("[network]\npublish_ports = \""+text+"\"\n"))
		if err != nil || c.Network.PublishPorts != want {
			t.Errorf("%q: got %+v, %v, want %+v", text, c.Network.PublishPorts, err, want)
		}
	}
	for _, u := range []string{"192.0.2.53:53", "[2001:db8::53]:53", "127.0.0.53:53", "tls://192.0.2.53:853#dns.example.com"} {
		if _, err := Parse("f.toml", []byte("[dns]\nupstreams = [\""+u+"\"]\n")); err != nil {
			t.Errorf("%s: %v", u, err)
		}
	}
}
