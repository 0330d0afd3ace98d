// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
)

// rivalRules are the rules of pathPolicy as a firewall of nftables would hold
// them: sets of address and port, the sender checked, every verdict counted,
// one counter for each rule.
const rivalRules = `table inet rival {
	set up {
		type ipv4_addr . inet_proto . inet_service
		flags interval
		elements = { 192.0.2.0/24 . tcp . 5000-5010, 192.0.2.0/24 . udp . 5000-5010 }
	}
	set others {
		type ipv4_addr . inet_proto . inet_service
		flags interval
		elements = {
			10.1.0.0/16 . tcp . 443, 10.2.0.0/16 . tcp . 443, 10.3.3.0/24 . tcp . 443, 198.51.100.0/25 . tcp . 443,
			203.0.113.64/26 . tcp . 443, 8.8.8.8 . tcp . 443, 9.9.9.0/24 . tcp . 443, 172.16.0.0/12 . tcp . 443,
			151.101.0.0/16 . tcp . 443
		}
	}
	set never {
		type ipv4_addr
		flags interval
		elements = { 169.254.0.0/16, 127.0.0.0/8, 224.0.0.0/4, 240.0.0.0/4, 100.96.0.0/16, 0.0.0.0/8 }
	}
	chain forward {
		type filter hook forward priority 0; policy accept;
		iifname "box" goto out
		oifname "box" counter accept
	}
	chain out {
		ether saddr != 02:62:68:00:00:01 counter drop
		ip saddr != 100.96.0.1 counter drop
		ip daddr @never counter drop
		ip daddr . meta l4proto . th dport @up counter accept
		ip daddr . meta l4proto . th dport @others counter accept
		counter drop
	}
}
`

// set makes mode the one that judges.
func (p *path) set(m mode) error {
	var err error
	if m == enforced {
		err = p.attach()
	} else {
		err = p.detach()
	}
	if err != nil {
		return err
	}
	switch {
	case m == rivalled && !p.rival:
		p.rival = true
		return p.nft(rivalRules)
	case m != rivalled && p.rival:
		return p.removeRival()
	}
	return nil
}

var rivalCounter = regexp.MustCompile(`@up counter packets [1-9]`)

// removeRival is an error if the rival has not judged what went through.
func (p *path) removeRival() error {
	if !p.rival {
		return nil
	}
	p.rival = false
	var out []byte
	err := within(p.host, func() (err error) {
		out, err = exec.Command("nft", "list", "chain", "inet", "rival", "out").CombinedOutput()
		return err
	})
	if err != nil {
		return fmt.Errorf("read the rival: %w: %s", err, out)
	}
	if !rivalCounter.Match(out) {
		return errors.Join(fmt.Errorf("the rival has judged nothing:\n%s", out), p.nft("delete table inet rival\n"))
	}
	return p.nft("delete table inet rival\n")
}

func (p *path) nft(rules string) error {
	return within(p.host, func() error {
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = bytes.NewReader([]byte(rules))
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("nft: %w: %s", err, out)
		}
		return nil
	})
}
